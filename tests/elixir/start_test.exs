defmodule StarweaveImage.StartTest do
  # A start may fail for whatever the machine lacks, the application may not: it is up, says why in one sentence, once in
  # its log, and works as soon as it can. Not async: variables of the environment belong to the whole VM.
  use ExUnit.Case, async: false

  import ExUnit.CaptureLog
  import StarweaveImage.TestInstance
  import StarweaveImage.TestOSProcess, only: [await: 1]

  alias StarweaveImage.{Environment, Error, Image, Scratch, Variables}
  alias StarweaveImage.Sidecar.Log

  doctest StarweaveImage.Backoff
  doctest StarweaveImage.Sidecar.Log

  @moduletag :tmp_dir
  @moduletag timeout: 300_000

  # A name, what is put into the environment, and what is said of it.
  @lacks [
    {"a home", %{"HOME" => nil, "XDG_CACHE_HOME" => nil}, "HOME is not set"},
    {"a home that has a name", %{"HOME" => "", "XDG_CACHE_HOME" => ""}, "HOME is not set"},
    {"a cache folder that is one", %{"STARWEAVE_IMAGE_CACHE" => "/dev/null"}, "is not set up"},
    {"a cache folder that is there", %{"STARWEAVE_IMAGE_CACHE" => "/no/such/folder"},
     "is not set up"},
    {"an interpreter", %{"STARWEAVE_IMAGE_PYTHON" => "/no/such/python"},
     "that STARWEAVE_IMAGE_PYTHON names is not an executable file"},
    {"an interpreter that may be executed", %{"STARWEAVE_IMAGE_PYTHON" => "/etc/passwd"},
     "that STARWEAVE_IMAGE_PYTHON names is not an executable file"}
  ]

  for {lack, variables, sentence} <- @lacks do
    test "for want of #{lack} it is down, and starts when that is put right" do
      Variables.put(
        Map.merge(
          %{"STARWEAVE_IMAGE_PYTHON" => nil, "STARWEAVE_IMAGE_CACHE" => nil},
          unquote(Macro.escape(variables))
        )
      )

      log =
        capture_log(fn ->
          host = start_supervised!({Supervisor, [{Agent, fn -> 0 end}]} |> host())
          instance = start(nil, backoff_min: 1, backoff_max: 20)
          status = await_state(instance, :down)
          assert status.error =~ unquote(sentence)
          assert [_one_line] = String.split(status.error, "\n")
          # Many starts later.
          assert await(fn -> sidecar(instance)[:generation] > 20 end)

          assert {:error, %Error{kind: :unavailable} = error} =
                   StarweaveImage.generate("a fig", instance: instance)

          assert error.message =~ unquote(sentence)
          assert {:error, %Error{kind: :unavailable}} = Environment.doctor()
          assert {:error, %Error{}} = Environment.setup(base_python: "no-such-python")

          System.put_env("STARWEAVE_IMAGE_PYTHON", fake("honest"))
          assert await_state(instance, :ready).error == nil
          assert {:ok, %Image{}} = StarweaveImage.generate("a fig", instance: instance)
          assert Process.alive?(host)
        end)

      assert [_once] = Regex.scan(~r/\[warning\] image sidecar 1 cannot start: .*/, log)
      refute log =~ "terminating"
    end
  end

  defp host({Supervisor, children}) do
    %{id: :host, start: {Supervisor, :start_link, [children, [strategy: :one_for_one]]}}
  end

  describe "the folder for temporary files" do
    for {what, name} <- [
          {"that is not there", "nowhere"},
          {"whose name is too long for a socket", String.duplicate("long", 40)}
        ] do
      test "#{what} is replaced", %{tmp_dir: folder} do
        path = Path.join(folder, unquote(name))
        if unquote(name) != "nowhere", do: File.mkdir!(path)
        Variables.put(%{"TMPDIR" => path, "TEMP" => nil, "TMP" => nil})
        instance = start_ready("honest")
        assert {:ok, %Image{}} = StarweaveImage.generate("a fig", instance: instance)
      end
    end

    test "keeps nothing of a BEAM that was killed as Python started, nor of both", %{
      tmp_dir: folder
    } do
      temporary = Path.join("/tmp", "sv#{System.pid()}#{System.unique_integer([:positive])}")
      File.mkdir!(temporary)
      on_exit(fn -> File.rm_rf!(temporary) end)
      Variables.put(%{"TMPDIR" => temporary})
      left = fn -> File.ls!(temporary) end
      waits = executable(folder, "#!/bin/sh\necho $$ >'#{folder}/pid'\nexec sleep 300\n")

      alias StarweaveImage.TestApplication
      application = TestApplication.start(folder, [waits, "0"])
      assert await(fn -> left.() != [] and File.exists?(Path.join(folder, "pid")) end)

      [python] = folder |> Path.join("pid") |> File.read!() |> String.split()
      signal = &StarweaveImage.TestOSProcess.signal(String.to_integer(&1), "KILL")
      signal.("#{application.beam}")
      signal.(python)
      assert await(fn -> not StarweaveImage.TestOSProcess.alive?(application.beam) end)
      assert [_of_both] = left.()

      # Whoever is next removes it, and nobody else's.
      other = Path.join(temporary, "starweave_image-1.1-abc")
      File.mkdir!(other)
      assert {:ok, scratch} = Scratch.create()
      assert left.() |> Enum.sort() == Enum.sort([Path.basename(scratch), Path.basename(other)])
      File.touch!(other, System.os_time(:second) - 100_000)
      assert :ok = Scratch.remove(scratch)
      assert {:ok, scratch} = Scratch.create()
      assert left.() == [Path.basename(scratch)]
      assert Bitwise.band(File.stat!(scratch).mode, 0o777) == 0o700
      Scratch.remove(scratch)

      # A BEAM that is killed when Python had the time to connect.
      application = TestApplication.start(folder, [fake("honest"), "0"])
      TestApplication.await_line(application, ~r/ready=true/)
      signal.("#{application.beam}")
      assert await(fn -> left.() == [] end), inspect(left.())
    end
  end

  test "without file descriptors it is down, and starts once there are some", %{tmp_dir: folder} do
    script = Path.join(folder, "descriptors.exs")

    File.write!(script, """
    held = fn held, files -> case :file.open("/dev/null", [:read, :raw]) do
      {:ok, file} -> held.(held, [file | files])
      {:error, :emfile} -> files
    end end
    {:ok, _} = Application.ensure_all_started(:logger)
    options = [python: System.fetch_env!("FAKE"), backoff_min: 10, backoff_max: 50, heartbeat_interval: 50]
    {:ok, host} = Supervisor.start_link([{Agent, fn -> 0 end}], strategy: :one_for_one)
    # As in a release: nothing is left to load later.
    :ok = Application.load(:starweave_image)
    for {name, _, _} <- Application.loaded_applications(), {:ok, modules} <- [:application.get_key(name, :modules)],
        module <- modules, do: Code.ensure_loaded(module)
    {:ok, first} = StarweaveImage.start_link([name: First] ++ options)
    :ok = StarweaveImage.await_ready(60_000, instance: First)
    files = held.(held, [])
    {:ok, _} = Supervisor.start_child(host, {StarweaveImage, [name: Second] ++ options})
    IO.puts("first " <> inspect(StarweaveImage.await_ready(60_000, instance: Second)))
    Enum.each(files, &:file.close/1)
    wait = fn wait -> unless StarweaveImage.available?(instance: Second), do: (Process.sleep(20); wait.(wait)) end
    wait.(wait)
    IO.puts("then " <> inspect(StarweaveImage.status(instance: Second).state) <> " " <> inspect(Process.alive?(host)))
    Supervisor.stop(host)
    Supervisor.stop(first)
    """)

    ebin = :starweave_image |> :code.lib_dir() |> Path.join("ebin")

    command =
      "ulimit -n 200; exec timeout -s KILL 120 elixir -pa '#{ebin}' '#{script}' 2>&1 </dev/null"

    {output, 0} = System.cmd("/bin/sh", ["-c", command], env: [{"FAKE", fake("honest")}])

    assert output =~
             ~r/first \{:error, %StarweaveImage.Error\{.*descriptors|first .*too many open files/

    assert output =~ "then :ready true"
  end

  test "what others write into the log shows as text, whatever it holds" do
    for {written, shown} <- [
          {"plain, with a tab\t.\r\n", "plain, with a tab\t."},
          {"\e]0;title\a\e[2J", "\\e]0;title\\u{7}\\e[2J"},
          {"a\rb\0c\bd\x7F", "a\\rb\\u{0}c\\u{8}d\\u{7F}"},
          {"C1 \u009B31m and \u0085", "C1 \\u{9B}31m and"},
          {"bidi \u202Etxt.exe\u2069", "bidi \\u{202E}txt.exe\\u{2069}"},
          {"half \xE2\x28", "half \\xE2("},
          {"Grüße, 世界, 🍎", "Grüße, 世界, 🍎"}
        ],
        do: assert(Log.printable(written) == shown)

    assert Log.printable_lines("one\n12:00:00.000 [error] two\e[0m") ==
             "one\n  | 12:00:00.000 [error] two\\e[0m"
  end

  test "the application's files and its Python's variables are nothing to the sidecar", %{
    tmp_dir: folder
  } do
    for name <- ["queue.py", "torch/__init__.py", "usercustomize.py", "sitecustomize.py"] do
      path = Path.join(folder, name)
      File.mkdir_p!(Path.dirname(path))
      File.write!(path, "import os\nos._exit(99)\n")
    end

    Variables.put(%{
      "PYTHONPATH" => folder,
      "PYTHONHOME" => folder,
      "PYTHONSTARTUP" => Path.join(folder, "queue.py"),
      "PYTHONWARNINGS" => "error"
    })

    ebin = :starweave_image |> :code.lib_dir() |> Path.join("ebin")

    script =
      ~s({:ok, _} = StarweaveImage.start_link([]\); IO.inspect(StarweaveImage.await_ready(240_000\)\))

    {output, 0} =
      System.cmd("elixir", ["-pa", ebin, "-e", script],
        cd: folder,
        stderr_to_stdout: true
      )

    assert output =~ ~r/^:ok$/m
    assert Path.wildcard(Path.join(folder, "**/__pycache__")) == []
  end
end
