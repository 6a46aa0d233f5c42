defmodule Mix.Tasks.Image.GenTest do
  # In this VM the command shares the name of the instance and the level of Logger.
  use ExUnit.Case, async: false

  import ExUnit.CaptureIO

  alias Mix.Tasks.Image.Gen
  alias StarweaveImage.Command

  @moduletag timeout: 300_000

  @small ~w(--width 64 --height 64 --steps 4)
  # Long enough to be ended in the middle.
  @long ~w(image.gen --prompt x --out FOLDER/x.png --width 64 --height 64 --steps 100 --num-images 16)

  defp run_here(argv) do
    level = Logger.level()

    try do
      code = catch_exit(with :ok <- Gen.run(argv), do: exit({:shutdown, 0}))
      {:shutdown, code} = code
      code
    after
      Logger.configure(level: level)
    end
  end

  defp refusal(argv) do
    error = capture_io(:stderr, fn -> assert run_here(argv) == 2 end)
    assert [line, ""] = error |> String.replace(~r/\e\[\d*m/, "") |> String.split("\n")
    "[image.gen] Error: " <> sentence = line
    sentence
  end

  defp in_folder(text, command), do: String.replace(text, "FOLDER", command.folder)

  defp written(command, prefix),
    do:
      command.folder |> File.ls!() |> Enum.filter(&String.starts_with?(&1, prefix)) |> Enum.sort()

  defp png_size(path) do
    <<0x89, "PNG\r\n", 0x1A, "\n", _::32, "IHDR", width::32, height::32, _::binary>> =
      File.read!(path)

    {width, height}
  end

  describe "wrong usage is one line on stderr, exit code 2 and no Python:" do
    for {argv, sentence} <- [
          {~w(--out x.png), "--prompt is required"},
          {["--prompt", " "], "prompt must be 1 to 8192 bytes of text"},
          {~w(--prompt x --guidence_scale 7), "did you mean --guidance-scale?"},
          {~w(--prompt x --num_imges 7), "did you mean --num-images?"},
          {~w(--prompt x --hight 64), "unknown option --hight, did you mean --height?"},
          {~w(--prompt x --turbo), "unknown option --turbo, see `mix help image.gen`"},
          {~w(--prompt x --no-safety), "unknown option --no-safety, see `mix help image.gen`"},
          {~w(--prompt red apple), "unexpected \"apple\": put the text of --prompt in quotes"},
          {~w(--prompt x --width wide), "--width must be an integer, got \"wide\""},
          {~w(--prompt x --width 250), "width must be a multiple of 8 from 64 to 4096, got 250"},
          {~w(--prompt x --steps 0), "steps must be an integer from 1 to 200, got 0"},
          {~w(--prompt x --steps), "--steps needs a value (N)"},
          {~w(--prompt x --guidance_scale -1), "guidance_scale must be a number from 0 to 50"},
          {~w(--prompt x --guidance-scale -1), "guidance_scale must be a number from 0 to 50"},
          {~w(--prompt x --negative_prompt=a --seed -2), "seed must be an integer from -1"},
          {~w(--prompt x --num_images 17), "num_images must be an integer from 1 to 16, got 17"},
          {~w(--prompt x --out -), "--out must name a file, not -"},
          {~w(--prompt x --out priv), "--out must be a file, priv is a folder"},
          {~w(--prompt x --out /dev/null --num-images 2),
           "--out must be a file for several images"},
          {~w(--prompt x --image /dev/zero), "image must be a PNG, JPEG or WebP file of at most"},
          {~w(--prompt x --out x.gif), "--out must end in .png, .jpg, .jpeg or .webp, got .gif"},
          {~w(--prompt x --out /no/such/folder/x.png), "--out must be in a folder that exists"},
          {~w(--prompt x --out x.png --format gif), "format must be one of png, jpeg, webp"},
          {~w(--prompt x --effort turbo), "effort must be one of draft, standard, high"},
          {~w(--prompt x --model ./no-such-folder), "--model must be a model's id or a folder"},
          {~w(--prompt x --device tpu), "--device must be one of auto, cpu, cuda"},
          {~w(--prompt x --image no-such.png),
           "--image cannot be read: no such file or directory"},
          {~w(--prompt x --images no-such.png),
           "--images cannot be read: no such file or directory"},
          {~w(--prompt x --images mix.exs --images mix.exs),
           "images must be a list of 1 to 4 PNG, JPEG or WebP files"},
          {~w(--prompt x --images) ++
             [
               "priv/models/starweave-tiny/sheet.png",
               "--image",
               "priv/models/starweave-tiny/sheet.png"
             ], "images stands in place of image"},
          {~w(--prompt x --image mix.exs),
           "image must be a PNG, JPEG or WebP file of at most 12 MiB"},
          {~w(--prompt x --mask priv/models/starweave-tiny/sheet.png), "mask needs image"},
          {~w(--prompt x --strength 2), "strength must be a number from 0 to 1"},
          {~w(--prompt x --variations 0), "num_images must be an integer from 1 to 16, got 0"},
          {~w(--prompt x --variation-strength 2),
           "variation_strength must be a number from 0 to 1"},
          {~w(--prompt x --variation-seed 2), "variation_seed needs variation_strength"},
          {~w(--prompt x --variations 2 --num-images 2),
           "--variations and --num-images are the same"},
          {~w(--prompt x --timeout 0), "--timeout must be from 1 to 86400 seconds, got 0"},
          {~w(--prompt x --quiet=maybe), "--quiet"}
        ] do
      test Enum.join(argv, " ") do
        assert refusal(unquote(argv)) =~ unquote(sentence)
      end
    end
  end

  test "--help is the text of `mix help image.gen`" do
    help = capture_io(fn -> assert run_here(["--help"]) == 0 end)
    assert help =~ "Generates an image from a text."
    # Those of a schema, with its ranges, and those of the command alone.
    assert help =~ "a multiple of 8 from 64 to 4096"

    for switch <- ~w(--prompt --effort --images --no-metadata --device --variations),
        do: assert(help =~ switch)

    refute help =~ "--durable"
  end

  test "in a pipe: the host's lines and plain progress, every host option in its spelling" do
    command =
      Command.run(
        ~w(image.gen --prompt) ++
          ["a red apple"] ++
          ~w(--out FOLDER/out.png --width 128 --height 64 --steps 5 --guidance_scale 3 --seed 7 --style flat
             --model starweave/tiny --host localhost --port 50051)
      )

    assert {command.status, Command.stderr(command)} == {0, ""}
    assert png_size(command.folder <> "/out.png") == {128, 64}
    refute command.output =~ "\e"
    lines = String.split(command.output, "\n")
    assert "[image.gen] Generating image..." in lines
    assert "[image.gen] Starting Python..." in lines
    assert "[image.gen] Loading the model..." in lines
    assert "[image.gen] Denoising, step 5/5" in lines
    assert "[image.gen] Saved to #{command.folder}/out.png" in lines
    assert "[image.gen] Metadata: " <> metadata = Enum.find(lines, &(&1 =~ "Metadata"))
    assert metadata =~ ~s(model: "starweave/tiny")
    assert metadata =~ "seed: 7"
    assert metadata =~ ~s("guidance_scale" => "3.0")
    assert Enum.any?(lines, &(&1 =~ "--host and --port are ignored"))
    Command.await_gone(command)
  end

  @tag :slow
  test "several images are numbered, in the format of the ending; --quiet says nothing" do
    argv =
      ~w(image.gen --prompt x --out FOLDER/out.webp --num_images 2 --quality 50 --quiet --no-metadata)

    command = Command.run(argv ++ @small)
    assert {command.status, command.output, Command.stderr(command)} == {0, "", ""}

    assert written(command, "out") == ["out-1.webp", "out-2.webp"]
    [one, two] = for n <- 1..2, do: File.read!("#{command.folder}/out-#{n}.webp")
    assert <<"RIFF", _::32, "WEBP", _::binary>> = one
    assert one != two
  end

  @tag :slow
  test "variations of a picture have its size, and start from it" do
    sheet = Application.app_dir(:starweave_image, "priv/models/starweave-tiny/sheet.png")

    argv =
      ["image.gen", "--prompt", "a red apple", "--image", sheet, "--out", "FOLDER/out.png"] ++
        ~w(--variations 2 --strength 0.3 --steps 4 --seed 5)

    command = Command.run(argv)
    assert {command.status, Command.stderr(command)} == {0, ""}
    assert written(command, "out") == ["out-1.png", "out-2.png"]
    assert png_size("#{command.folder}/out-1.png") == png_size(sheet)
    assert command.output =~ "seed: 5" and command.output =~ "seed: 6"
  end

  @tag :slow
  test "a local folder is a model" do
    folder = Application.app_dir(:starweave_image, "priv/models/starweave-tiny")

    command =
      Command.run(
        ["image.gen", "--prompt", "x", "--out", "FOLDER/x", "--model", folder] ++ @small
      )

    assert {command.status, Command.stderr(command)} == {0, ""}
    assert command.output =~ ~s(model: "local/starweave-tiny")
    assert png_size(command.folder <> "/x") == {64, 64}
  end

  describe "--preview" do
    @tag :slow
    test "shows how the image forms in a file, which is gone at the end" do
      command = Command.start(@long ++ ["--preview"])
      line = in_folder("[image.gen] Preview in FOLDER/x.preview.jpg", command)
      command = Command.await_output(command, line)
      # It stands there from the moment on that it is announced, whole, whatever replaces it.
      assert <<0xFF, 0xD8, 0xFF, _::binary>> =
               jpeg = File.read!(command.folder <> "/x.preview.jpg")

      assert binary_part(jpeg, byte_size(jpeg), -2) == <<0xFF, 0xD9>>
      assert ended(command, "TERM").status == 143
      assert written(command, "x") == []
    end

    @tag :slow
    test "says so in one line, and leaves the image alone" do
      argv = ~w(image.gen --prompt x --out FOLDER/x.webp --num-images 2 --preview) ++ @small
      command = Command.run(argv)
      assert {command.status, Command.stderr(command)} == {0, ""}
      assert written(command, "x") == ["x-1.webp", "x-2.webp"]
      lines = String.split(command.output, "\n")
      line = in_folder("[image.gen] Preview in FOLDER/x.preview.jpg, until the end", command)
      assert Enum.count(lines, &(&1 == line)) == 1
      assert Enum.count(lines, &(&1 == "[image.gen] Loading the model...")) == 1
      assert Enum.find_index(lines, &(&1 == line)) < Enum.find_index(lines, &(&1 =~ "Saved to"))
    end
  end

  test "on a terminal: a bar with steps" do
    argv = ["image.gen", "--prompt", "x", "--out", "FOLDER/x.png" | @small]
    command = Command.run(argv, terminal: true)
    assert command.status == 0
    assert command.output =~ "\r\e[KStarting Python..."
    assert command.output =~ "\r\e[KLoading the model..."
    assert command.output =~ ~r/\r\e\[KDenoising \[#+\.+\] 2\/4/
    assert command.output =~ "[image.gen] Saved to "
  end

  test "a limit of the model is wrong usage, too" do
    command = Command.run(~w(image.gen --prompt x --out FOLDER/x.png --width 2048))
    assert command.status == 2
    assert [line] = command |> Command.stderr() |> String.split("\n", trim: true)
    assert line =~ "width must be a multiple of 8 from 64 to"
    assert written(command, "x") == []
  end

  test "--list-models prints a table and nothing else" do
    command = Command.run(~w(image.gen --list-models))
    assert {command.status, Command.stderr(command)} == {0, ""}
    [head | rows] = String.split(command.output, "\n", trim: true)
    assert String.split(head) == ~w(ID STATE TASKS SIZE LICENCE)

    assert Enum.any?(
             rows,
             &(&1 =~
                 ~r/^starweave\/tiny +available +text_to_image, image_to_image, inpaint +\d+x\d+ +Apache-2.0$/)
           )

    assert Enum.any?(rows, &(&1 =~ ~r/^stable-diffusion-v1-5\/stable-diffusion-v1-5 /))
  end

  test "without Python: exit code 3 and a sentence that helps" do
    env = [{"STARWEAVE_IMAGE_PYTHON", "/no/such/python"}]

    for argv <- [~w(image.gen --prompt x --out FOLDER/x.png), ~w(image.gen --list-models)] do
      command = Command.run(argv, env: env)
      assert command.status == 3
      assert [line] = command |> Command.stderr() |> String.split("\n", trim: true)
      assert line =~ "STARWEAVE_IMAGE_PYTHON names is not an executable file"
    end
  end

  @tag :slow
  test "text is taken as typed without a UTF-8 locale" do
    argv = ["image.gen", "--prompt=" <> String.duplicate("🍎", 2049), "--out", "FOLDER/x.png"]
    command = Command.run(argv, env: [{"LC_ALL", "C"}])
    assert command.status == 2

    assert Command.stderr(command) =~
             "prompt must be 1 to 8192 bytes of text, not only white space"

    assert Command.stderr(command) =~ "got 8196 bytes of text"
  end

  @tag :tmp_dir
  @tag :slow
  test "names of files are taken as typed, too", %{tmp_dir: folder} do
    picture = Path.join(folder, "ß模.png")

    File.cp!(
      Application.app_dir(:starweave_image, "priv/models/starweave-tiny/sheet.png"),
      picture
    )

    argv = ["image.gen", "--prompt", "x", "--image", picture, "--out", "FOLDER/né 模.png"]
    command = Command.run(argv ++ ~w(--steps 4 --strength 0.3), env: [{"LC_ALL", "C"}])
    assert {command.status, Command.stderr(command)} == {0, ""}
    assert written(command, "n") == ["né 模.png"]
    assert command.output =~ "Saved to #{command.folder}/né 模.png"
    # And by the other tasks, which have one way to take them.
    command = Command.run(~w(image.models rm é/ü), env: [{"LC_ALL", "C"}])

    assert {command.status, Command.stderr(command)} ==
             {2, "starweave-image: é/ü is not in the cache\n"}
  end

  @tag :slow
  test "what cannot be printed is no failure; what cannot be written is one" do
    argv = ["image.gen", "--prompt", "x", "--out", "FOLDER/x.png" | @small]

    for stdout <- ["> /dev/full", ">&-"] do
      command = Command.run(argv, stdout: stdout)
      assert {stdout, command.status, written(command, "x")} == {stdout, 0, ["x.png"]}
    end

    command = Command.run(~w(image.models list), stdout: "> /dev/full")
    assert command.status == 0

    command =
      Command.run(["image.gen", "--prompt", "x", "--out", "/dev/full", "--quiet" | @small])

    assert {command.status, command.output} == {1, ""}
    sentence = "[image.gen] Error: /dev/full cannot be written: no space left on device"
    assert Command.stderr(command) =~ sentence
  end

  @tag :slow
  test "a picture on the standard output stands there alone" do
    argv = ["image.gen", "--prompt", "x", "--out", "/dev/stdout", "--format", "jpeg" | @small]
    command = Command.run(argv)
    assert {command.status, Command.stderr(command)} == {0, ""}
    assert <<0xFF, 0xD8, 0xFF, _::binary>> = command.output
    assert binary_part(command.output, byte_size(command.output), -2) == <<0xFF, 0xD9>>
  end

  describe "no Python process is left, and the command ends, after" do
    @tag :slow
    test "SIGTERM while Python starts" do
      command = @long |> Command.start() |> Command.await_output("Starting Python")
      assert ended(command, "TERM").status == 143
    end

    test "SIGTERM while it works" do
      command = @long |> Command.start() |> Command.await_output("Denoising")
      assert ended(command, "TERM").status == 143
    end

    test "kill -9" do
      command = @long |> Command.start() |> Command.await_output("Denoising")
      assert ended(command, "KILL").status == 137
    end

    @tag :slow
    test "a closed terminal" do
      command = @long |> Command.start(terminal: true) |> Command.await_output("Denoising")
      assert [_, _] = Command.pids(command, "run.py port")
      [terminal] = Command.pids(command, "script -qefc") -- Command.pids(command, "timeout")
      Command.signal(terminal, "KILL")
      assert Command.await_gone(command) < 10_000
    end

    @tag :slow
    test "Ctrl-C pressed twice" do
      command = @long |> Command.start(terminal: true) |> Command.await_output("Denoising")
      assert [_, _] = Command.pids(command, "run.py port")
      command = command |> Command.type("\x03") |> Command.await_output("BREAK")
      Command.type(command, "\x03")
      assert Command.await_gone(command) < 10_000
    end

    @tag :slow
    test "Ctrl-C with +Bd" do
      env = [{"ELIXIR_ERL_OPTIONS", "#{System.get_env("ELIXIR_ERL_OPTIONS")} +Bd"}]

      command =
        @long |> Command.start(terminal: true, env: env) |> Command.await_output("Denoising")

      assert [_, _] = Command.pids(command, "run.py port")
      Command.type(command, "\x03")
      assert Command.await_gone(command) < 10_000
      assert Command.await_exit(command).status == 130
    end
  end

  defp ended(command, signal) do
    [vm] = Command.pids(command, "beam")
    Command.signal(vm, signal)
    assert Command.await_gone(command) < 10_000
    Command.await_exit(command)
  end

  test "it uses the instance of the application, and leaves it running" do
    start_supervised!(StarweaveImage)
    assert :ok = StarweaveImage.await_ready(120_000)
    before = os_pid()
    out = Path.join(System.tmp_dir!(), "swi-#{System.pid()}.png")
    on_exit(fn -> File.rm(out) end)

    said = capture_io(fn -> assert run_here(["--prompt", "x", "--out", out] ++ @small) == 0 end)

    assert said =~ "[image.gen] Saved to #{out}"
    refute said =~ "Starting Python"
    assert png_size(out) == {64, 64}
    assert os_pid() == before
    assert StarweaveImage.available?()
  end

  defp os_pid do
    %{sidecars: [%{os_pid: os_pid}]} = StarweaveImage.status()
    os_pid
  end
end
