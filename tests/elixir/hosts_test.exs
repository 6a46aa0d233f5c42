defmodule StarweaveImage.HostsTest do
  # Projects that use this library in each way there is, made for the test and run with the environment that is there.
  use ExUnit.Case, async: true

  @moduletag :slow
  @moduletag :hosts
  @moduletag :tmp_dir
  @moduletag timeout: 600_000

  @root Path.expand("../..", __DIR__)
  @env [
    {"MIX_ENV", "dev"},
    {"MIX_BUILD_PATH", nil},
    {"MIX_DEPS_PATH", nil},
    {"HEX_OFFLINE", "1"},
    {"ERL_LIBS", nil}
  ]

  @draw ~s|StarweaveImage.generate!("a red apple", seed: 1, steps: 2)|

  test "a path dependency, through the application's own tree", %{tmp_dir: tmp_dir} do
    host(tmp_dir, "path: #{inspect(@root)}")
    mix(tmp_dir, ["image.setup", "--if-missing"])

    out =
      mix(tmp_dir, ["image.gen", "--prompt", "a red apple", "--steps", "2", "--out", "apple.png"])

    assert out =~ "[image.gen] Saved to apple.png"
    assert png?(Path.join(tmp_dir, "apple.png"))
  end

  test "a client of the host's own name, by its script and by its task, whether the application runs or not",
       %{
         tmp_dir: tmp_dir
       } do
    host(
      tmp_dir,
      "path: #{inspect(@root)}",
      "{Host.Images.Client, host: \"localhost\", port: 50051}"
    )

    File.mkdir_p!(Path.join(tmp_dir, "lib/host/images"))

    File.write!(Path.join(tmp_dir, "lib/host/images/client.ex"), """
    defmodule Host.Images.Client do
      use StarweaveImage.Client
    end
    """)

    File.write!(Path.join(tmp_dir, "draw.exs"), """
    alias Host.Images.Client
    # By the application's tree, or else of the script's own.
    started = Process.whereis(Host.Images.Client)
    unless started, do: {:ok, _pid} = Client.start_link(host: "localhost", port: 50051, enabled: true)
    IO.puts("started: \#{is_pid(started)}, available: \#{Client.available?()}")
    opts = [width: 128, height: 64, steps: 2, guidance_scale: 7.5, model: "runwayml/stable-diffusion-v1-5"]
    {:ok, data, %{model: "starweave/tiny"}} = Client.generate_image("a sunset over a lake", opts)
    {:ok, [_ | _]} = Client.list_models()
    File.write!("out.png", data)
    """)

    mix(tmp_dir, ["image.setup", "--if-missing"])

    for {arguments, started} <- [{[], true}, {["--no-start"], false}] do
      File.rm(Path.join(tmp_dir, "out.png"))
      out = mix(tmp_dir, ["run"] ++ arguments ++ ["draw.exs"])
      assert out =~ "started: #{started}, available: true"
      assert png?(Path.join(tmp_dir, "out.png"))
    end

    task =
      ~w(image.gen --out task.png --width 128 --height 64 --steps 2 --guidance_scale 7.5 --prompt)

    assert mix(tmp_dir, task ++ ["a cabin"]) =~ "[image.gen] Saved to task.png"
    assert png?(Path.join(tmp_dir, "task.png"))
  end

  test "a git dependency", %{tmp_dir: tmp_dir} do
    repository = Path.join(tmp_dir, "library")
    File.mkdir!(repository)

    # One by one, without Python's caches: it renames files there while other tests run.
    for pattern <- ~w(mix.exs lib/** priv/**),
        path <- Path.wildcard(Path.join(@root, pattern)),
        File.regular?(path) and not (path =~ "__pycache__") do
      copy = Path.join(repository, Path.relative_to(path, @root))
      File.mkdir_p!(Path.dirname(copy))
      File.cp!(path, copy)
    end

    git = fn arguments ->
      run(repository, "git", ["-c", "user.name=t", "-c", "user.email=t@localhost" | arguments])
    end

    for arguments <- [~w(init -q), ~w(add .), ~w(commit -q -m all)], do: git.(arguments)

    app = Path.join(tmp_dir, "app")
    File.mkdir!(app)
    host(app, "git: #{inspect("file://" <> repository)}")
    mix(app, ["deps.get"])
    mix(app, ["image.setup", "--if-missing"])
    mix(app, ["run", "-e", save(@draw)])
    assert png?(Path.join(app, "out.png"))
  end

  test "a script with Mix.install", %{tmp_dir: tmp_dir} do
    File.write!(Path.join(tmp_dir, "draw.exs"), """
    Mix.install([{:starweave_image, path: #{inspect(@root)}}])
    Mix.Task.run("image.setup", ["--if-missing"])
    {:ok, _} = Supervisor.start_link([{StarweaveImage, name: StarweaveImage}], strategy: :one_for_one)
    #{save(@draw)}
    """)

    run(tmp_dir, "elixir", ["draw.exs"], [{"MIX_INSTALL_DIR", Path.join(tmp_dir, "installs")}])
    assert png?(Path.join(tmp_dir, "out.png"))
  end

  test "a release, without Mix", %{tmp_dir: tmp_dir} do
    host(tmp_dir, "path: #{inspect(@root)}")
    mix(tmp_dir, ["release", "--quiet", "--path", "release"], [{"MIX_ENV", "prod"}])
    # What it was built from is not there where it runs.
    for name <- ~w(_build deps lib mix.exs), do: File.rm_rf!(Path.join(tmp_dir, name))

    program = Path.join(tmp_dir, "release/bin/host")

    assert run(tmp_dir, program, [
             "eval",
             "{:ok, report} = StarweaveImage.setup(); IO.puts(report.doctor)"
           ]) =~ ~r/^torch +2\./m

    run(tmp_dir, program, [
      "eval",
      "{:ok, _} = Application.ensure_all_started(:host); " <> save(@draw)
    ])

    assert png?(Path.join(tmp_dir, "out.png"))
  end

  defp host(folder, dependency, child \\ "{StarweaveImage, name: StarweaveImage}") do
    File.mkdir_p!(Path.join(folder, "lib"))

    File.write!(Path.join(folder, "mix.exs"), """
    defmodule Host.MixProject do
      use Mix.Project

      def project do
        [app: :host, version: "0.1.0", deps: [{:starweave_image, #{dependency}}]]
      end

      def application, do: [mod: {Host, []}]
    end
    """)

    File.write!(Path.join(folder, "lib/host.ex"), """
    defmodule Host do
      use Application

      @impl true
      def start(_type, _args) do
        Supervisor.start_link([#{child}], strategy: :one_for_one)
      end
    end
    """)
  end

  defp save(draw), do: "StarweaveImage.Image.save(#{draw}, \"out.png\")"

  defp mix(folder, arguments, env \\ []), do: run(folder, "mix", arguments, env)

  defp run(folder, program, arguments, env \\ []) do
    {text, status} =
      System.cmd("timeout", ["-s", "KILL", "300", program | arguments],
        cd: folder,
        env: @env ++ env,
        stderr_to_stdout: true
      )

    assert status == 0,
           "#{Path.basename(program)} #{Enum.join(arguments, " ")} exited #{status}:\n#{text}"

    text
  end

  defp png?(path), do: match?({:ok, <<0x89, "PNG\r\n", 0x1A, "\n", _::binary>>}, File.read(path))
end
