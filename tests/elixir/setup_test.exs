defmodule StarweaveImage.SetupTest do
  # Environments made by the real pip, from a folder and from an index of wheels that hold one empty module each, and by
  # lists that name the versions of the library's own with the hashes of these.
  # Not async: variables of the system's environment belong to the whole VM.
  use ExUnit.Case, async: false

  alias StarweaveImage.{Environment, Variables}

  @moduletag :tmp_dir
  @moduletag timeout: 300_000

  @modules %{"pillow" => "PIL", "protobuf" => "google/protobuf"}

  @server """
  import functools, http.server, sys, threading

  class Quiet(http.server.SimpleHTTPRequestHandler):
      def log_message(self, *args):
          pass

  folder = functools.partial(Quiet, directory=sys.argv[1])
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), folder)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  print(server.server_address[1], flush=True)
  sys.stdin.read()
  """

  setup %{tmp_dir: tmp_dir} do
    code =
      "import sys, sysconfig; print(sys._base_executable, *sys.version_info[:2], sysconfig.get_platform())"

    {:ok, python} = Environment.python()
    {facts, 0} = System.cmd(python, ["-c", code])
    [python, major, minor, platform] = String.split(facts)
    [elixir, path] = [System.find_executable("elixir"), System.get_env("PATH")]

    # Python alone: neither uv nor the tool of a GPU.
    bin = Path.join(tmp_dir, "bin")
    File.mkdir!(bin)
    File.ln_s!(python, Path.join(bin, "python3"))

    Variables.put(%{
      "PATH" => bin,
      "STARWEAVE_IMAGE_CACHE" => Path.join(tmp_dir, "cache"),
      "STARWEAVE_IMAGE_PYTHON" => nil,
      "STARWEAVE_IMAGE_WHEELS" => nil,
      "STARWEAVE_IMAGE_TORCH_INDEX" => "http://127.0.0.1:1",
      "PIP_CONFIG_FILE" => "/dev/null",
      "PIP_INDEX_URL" => "http://127.0.0.1:1/simple",
      "PIP_EXTRA_INDEX_URL" => nil,
      "PIP_FIND_LINKS" => nil,
      "PIP_NO_INDEX" => nil,
      "PIP_RETRIES" => "1",
      "PIP_NO_CACHE_DIR" => "1"
    })

    tag = "cp#{major}#{minor}"
    packages = Path.join(tmp_dir, "packages")
    priv = Environment.pythonpath()
    library(tmp_dir, lists(priv, packages))

    {:ok,
     python: python,
     elixir: elixir,
     path: path,
     packages: packages,
     priv: priv,
     tag: "#{tag}-#{tag}-#{String.replace(platform, ~r/[-.]/, "_")}"}
  end

  test "from a folder that has everything, through additions and damage", context do
    wheels = wheels(context, ["+cpu"])
    assert {:ok, report} = make(torch: :cpu, wheels: wheels)
    assert %{torch: :cpu, python: python, doctor: nil} = report
    assert %{"torch" => "2.13.0+cpu"} = installed = installed(python)
    refute installed["pytest"] || installed["openvino"]
    assert Environment.python() == {:ok, python}
    assert "PyTorch is 2.13.0+cpu, from a folder of wheels" in lines()

    path = System.get_env("PATH")
    System.put_env("PATH", "/nothing")
    assert make(torch: :cpu) == {:ok, report}
    assert make([]) == {:ok, report}
    assert lines() == []
    System.put_env("PATH", path)

    assert {:ok, ^report} = make(wheels: wheels, openvino: true)
    assert installed(python)["openvino"]
    assert lines() == ["Installing OpenVINO"]
    assert {:ok, ^report} = make(wheels: wheels, dev: true)
    assert installed(python)["pytest"]
    assert lines() == ["Installing the tools of the tests"]
    assert {:ok, ^report} = make(openvino: true, dev: true)
    assert lines() == []

    # A virtual environment whose Python was removed from the machine is none.
    [marker] = Path.wildcard(Path.join(context.tmp_dir, "cache/*/cpu/complete"))
    {:ok, whole} = File.read(marker)
    File.write!(marker, String.replace(whole, ~r/base,\K.*(?=}\.)/, ~s("/no/such/python")))
    assert {:error, "the Python environment is not set up" <> _} = Environment.python()
    File.write!(marker, whole)
    assert Environment.python() == {:ok, python}

    # The doctor refuses empty modules in the end, but the package is back.
    [torch] = Path.wildcard(Path.join(Path.dirname(marker), "lib/python3*/site-packages/torch"))
    File.rm_rf!(torch)
    assert {:error, %{details: %{doctor: _}}} = make(wheels: wheels, check: true)
    assert "The environment is damaged and is made again" in lines()
    assert File.dir?(torch)
  end

  @tag :slow
  test "from an index with PyTorch's builds, and the rest from PyPI", context do
    index = index(context, %{"cpu" => ["+cpu"], "cu126" => ["+cu126"], "rocm7.1" => ["+rocm7.1"]})
    System.put_env("STARWEAVE_IMAGE_TORCH_INDEX", index <> "/whl")
    System.put_env("PIP_INDEX_URL", index <> "/simple")

    # torch needs it, and this index has another version than the pinned one.
    numpy = Path.join(context.tmp_dir, "index/whl/cu126/numpy")
    File.mkdir_p!(numpy)
    wheel(numpy, "numpy", "99.0", "py3-none-any")

    assert {:ok, %{torch: :cuda, python: python}} = make(torch: :cuda)
    assert %{"torch" => "2.13.0+cu126", "numpy" => "2." <> _} = installed(python)
    assert "PyTorch is 2.13.0+cu126, from #{index}/whl/cu126" in lines()
  end

  @tag :slow
  test "from PyPI alone, with its build and not a folder's for another device", context do
    System.put_env("PIP_INDEX_URL", index(context, %{}) <> "/simple")
    System.put_env("PIP_FIND_LINKS", wheels(context, ["+cpu"]))

    assert {:ok, %{python: python}} = make(torch: :cuda)
    assert installed(python)["torch"] == "2.13.0"
  end

  test "without any source it fails with what to do, and leaves nothing half-made", context do
    assert {:error, error} = make(torch: :cpu)
    assert error.kind == :unavailable
    assert Exception.message(error) =~ "no package index can be reached"
    refute Exception.message(error) =~ context.tmp_dir
    assert File.exists?(error.details.log)
    assert Path.wildcard(Path.join(context.tmp_dir, "cache/*/cpu")) == []
    assert {:error, "the Python environment is not set up" <> _} = Environment.python()

    if :os.type() == {:unix, :linux},
      do: assert(Enum.any?(lines(), &(&1 =~ "PyPI's build brings 3 GB for CUDA")))
  end

  @tag :slow
  test "a file that is not the pinned one ends it with its name, from a folder and from an index",
       context do
    forged = fn folder ->
      [path] = Path.wildcard(folder <> "/peft-*.whl")
      [name, version, tag] = path |> Path.basename(".whl") |> String.split("-", parts: 3)
      wheel(folder, name, version, tag, "print('forged')")
    end

    sentence =
      "the Python packages could not be installed: " <>
        "the file found for peft is not the pinned one (its SHA-256 differs)"

    wheels = wheels(context, ["+cpu"])
    forged.(wheels)
    assert {:error, error} = make(torch: :cpu, wheels: wheels)
    assert Exception.message(error) == sentence
    assert Path.wildcard(Path.join(context.tmp_dir, "cache/*/cpu")) == []
    assert {:error, "the Python environment is not set up" <> _} = Environment.python()

    System.put_env("PIP_INDEX_URL", index(context, %{}) <> "/simple")
    forged.(Path.join(context.tmp_dir, "index/simple/peft"))
    assert {:error, error} = make(torch: :cpu)
    assert Exception.message(error) == sentence
    assert Path.wildcard(Path.join(context.tmp_dir, "cache/*/cpu")) == []
  end

  @tag :slow
  test "what an environment has stays when an extra is refused", context do
    wheels = wheels(context, ["+cpu"])
    assert {:ok, report} = make(torch: :cpu, wheels: wheels)
    [path] = Path.wildcard(wheels <> "/pytest-*.whl")
    File.write!(path, "junk")
    assert {:error, error} = make(wheels: wheels, dev: true)
    assert Exception.message(error) =~ "the file found for pytest is not the pinned one"
    refute installed(report.python)["mypy"]
    assert Environment.python() == {:ok, report.python}
  end

  @tag :slow
  test "ROCm's build is nowhere but on PyTorch's index", context do
    System.put_env("PIP_INDEX_URL", index(context, %{}) <> "/simple")
    assert {:error, error} = make(torch: :rocm)

    assert Exception.message(error) =~
             "cannot be reached: name a folder of wheels, or choose the CPU"

    assert {:error, _} = Environment.python()
  end

  @tag :slow
  test "two at once make it once", context do
    wheels = wheels(context, ["+cpu"])
    test = self()
    progress = &send(test, {:line, &1})

    results =
      for(
        _ <- 1..2,
        do:
          Task.async(fn ->
            Environment.setup(torch: :cpu, wheels: wheels, check: false, progress: progress)
          end)
      )
      |> Task.await_many(240_000)

    assert [{:ok, report}, {:ok, report}] = results
    lines = lines()
    assert Enum.count(lines, &(&1 =~ "Making a Python")) == 1
    assert "Waiting for another set-up to end" in lines
  end

  @tag :slow
  test "one whose BEAM is killed stops, and the next one makes it", context do
    {:ok, listener} = :gen_tcp.listen(0, [:binary, active: false, ip: {127, 0, 0, 1}])
    {:ok, port} = :inet.port(listener)
    wheels = wheels(context, ["+cpu"])

    # It finds torch, and waits for ever for an index that takes the connection and does not answer.
    torch_only = Path.join(context.tmp_dir, "torch-only")
    File.mkdir!(torch_only)

    for torch <- Path.wildcard(wheels <> "/torch-*"),
        do: File.cp!(torch, Path.join(torch_only, Path.basename(torch)))

    code = "StarweaveImage.Environment.setup(torch: :cpu, check: false)"
    paths = Enum.flat_map(:code.get_path(), &["-pa", to_string(&1)])

    beam =
      Port.open({:spawn_executable, context.elixir}, [
        :binary,
        :exit_status,
        :stderr_to_stdout,
        args: paths ++ ["-e", "IO.puts(System.pid()); " <> code],
        env: [
          {~c"PATH", to_charlist(System.get_env("PATH") <> ":" <> context.path)},
          {~c"PIP_FIND_LINKS", to_charlist(torch_only)},
          {~c"PIP_INDEX_URL", ~c"http://127.0.0.1:#{port}/simple"},
          {~c"UV_DEFAULT_INDEX", ~c"http://127.0.0.1:#{port}/simple"}
        ]
      ])

    {:ok, connection} = :gen_tcp.accept(listener, 120_000)
    assert_receive {^beam, {:data, first}}
    [os_pid | _] = String.split(first)
    {_, 0} = System.cmd("/bin/sh", ["-c", "kill -9 #{os_pid}"])

    # pip is gone when its end of the connection is.
    assert {:error, :closed} = drain(connection)
    :gen_tcp.close(listener)

    assert {:error, _} = Environment.python()
    assert {:ok, report} = make(torch: :cpu, wheels: wheels)
    assert installed(report.python)["torch"] == "2.13.0+cpu"
  end

  test "a Python that is too old or none at all is refused", context do
    old = Path.join(context.tmp_dir, "old")

    facts =
      "echo version 3.9; echo executable /usr/bin/python3.9; echo system linux; echo venv venv 1"

    File.write!(old, "#!/bin/sh\n" <> facts <> "\n")
    File.chmod!(old, 0o755)
    assert {:error, error} = make(torch: :cpu, base_python: old)
    assert Exception.message(error) == "Python 3.10 to 3.14 is needed, and this is 3.9"

    assert {:error, error} = make(torch: :cpu, base_python: "no-such-python")
    assert Exception.message(error) == "the interpreter that `base_python` names is no Python 3"
  end

  test "options are checked, and a near miss is named" do
    assert {:error, error} = make(torch: :gpu)
    assert Exception.message(error) == "torch must be one of cpu, cuda, rocm, got :gpu"
    assert error.details.field == :torch

    assert {:error, error} = make(wheel: "x")
    assert Exception.message(error) == "unknown option :wheel, did you mean :wheels?"
  end

  test "the lists have the versions that are tested, with hashes, and all that is required", %{
    priv: priv
  } do
    pinned = for [_, name, version] <- pins(priv, "constraints.txt"), do: {name, version}
    listed = for extra <- ["", "-openvino", "-dev"], do: {extra, pins(priv, "pins#{extra}.txt")}

    every = for {_, list} <- listed, [_, name, version] <- list, uniq: true, do: {name, version}
    assert Enum.sort(every) == Enum.sort(pinned -- [{"torch", "2.13.0"}])

    for {extra, list} <- listed do
      names = Enum.map(list, &Enum.at(&1, 1))
      assert required(priv, "requirements#{extra}.txt") -- ["torch" | names] == []

      for [entry | _] <- list,
          do: assert(entry =~ ~r/\A\S+( ; .+)?( \\\n    --hash=sha256:[0-9a-f]{64})+\z/)
    end
  end

  defp make(opts) do
    test = self()
    Environment.setup([progress: &send(test, {:line, &1}), check: false] |> Keyword.merge(opts))
  end

  defp lines do
    receive do
      {:line, line} -> [line | lines()]
    after
      0 -> []
    end
  end

  defp drain(connection) do
    with {:ok, _} <- :gen_tcp.recv(connection, 0, 60_000), do: drain(connection)
  end

  defp installed(python) do
    code = "import importlib.metadata as m\nfor d in m.distributions(): print(d.name, d.version)"
    {text, 0} = System.cmd(python, ["-c", code])

    for line <- String.split(text, "\n", trim: true),
        into: %{},
        do: line |> String.split() |> List.to_tuple()
  end

  # Each entry of a list, with its name and version.
  defp pins(priv, file),
    do: Regex.scan(~r/^([\w-]+)==([^\s;]+).*(?:\n .*)*/m, File.read!(Path.join(priv, file)))

  defp required(priv, file) do
    for [name] <- Regex.scan(~r/^[a-z_-]+/m, File.read!(Path.join(priv, file))),
        do: String.replace(name, "_", "-")
  end

  # A wheel of each version of every package that is asked for, but torch, and the lists with the hashes of them.
  defp lists(priv, folder) do
    File.mkdir_p!(folder)
    extras = ["", "-openvino", "-dev"]
    asked = Enum.flat_map(extras, &required(priv, "requirements#{&1}.txt")) -- ["torch"]

    hashes =
      for [_, name, version] <- pins(priv, "constraints.txt"), name in asked, into: %{} do
        path = wheel(folder, String.replace(name, "-", "_"), version, "py3-none-any")
        {{name, version}, :crypto.hash(:sha256, File.read!(path)) |> Base.encode16(case: :lower)}
      end

    for extra <- extras do
      entries =
        for [entry, name, version] <- pins(priv, "pins#{extra}.txt"), name in asked do
          [pin | _] = String.split(entry, " \\\n")
          "#{pin} --hash=sha256:#{hashes[{name, version}]}\n"
        end

      {"pins#{extra}.txt", entries}
    end
  end

  # The library with other lists: a folder of its own in the code path, with links to what is the same.
  defp library(tmp_dir, lists) do
    ours = Path.join(tmp_dir, "library/starweave_image")
    theirs = Application.app_dir(:starweave_image)
    priv = Path.join(ours, "priv/python")
    File.mkdir_p!(priv)
    File.ln_s!(Path.join(theirs, "ebin"), Path.join(ours, "ebin"))

    for name <- ~w(bootstrap.py run.py starweave_image),
        do: File.ln_s!(Path.join([theirs, "priv/python", name]), Path.join(priv, name))

    for {name, text} <- lists, do: File.write!(Path.join(priv, name), text)
    put = &(true = :code.replace_path(:starweave_image, to_charlist(Path.join(&1, "ebin"))))
    put.(ours)
    on_exit(fn -> put.(theirs) end)
  end

  # A folder with all of them and one wheel of torch for each label.
  defp wheels(context, labels) do
    folder = Path.join(context.tmp_dir, "wheels")
    File.mkdir_p!(folder)
    File.cp_r!(context.packages, folder)
    for label <- labels, do: wheel(folder, "torch", "2.13.0" <> label, context.tag)
    folder
  end

  defp wheel(folder, name, version, tag, code \\ "") do
    info = "#{name}-#{version}.dist-info"
    needs = if name == "torch", do: "Requires-Dist: numpy\n"

    files = [
      {"#{@modules[name] || name}/__init__.py", code},
      {"#{info}/METADATA", "Metadata-Version: 2.1\nName: #{name}\nVersion: #{version}\n#{needs}"},
      {"#{info}/WHEEL",
       "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: #{tag}\n"}
    ]

    record = Enum.map_join(files ++ [{"#{info}/RECORD", ""}], fn {file, _} -> "#{file},,\n" end)

    entries =
      for {file, text} <- files ++ [{"#{info}/RECORD", record}], do: {to_charlist(file), text}

    path = Path.join(folder, "#{name}-#{version}-#{tag}.whl")
    {:ok, _} = :zip.create(to_charlist(path), entries)
    path
  end

  # A server with PyPI's layout at /simple and PyTorch's at /whl.
  defp index(context, builds) do
    root = Path.join(context.tmp_dir, "index")

    for path <- Path.wildcard(wheels(%{context | tmp_dir: root}, [""]) <> "/*.whl"),
        [name | _] = path |> Path.basename() |> String.split("-"),
        do: place(path, Path.join([root, "simple", String.replace(name, "_", "-")]))

    for {name, labels} <- builds, label <- labels do
      folder = Path.join([root, "whl", name, "torch"])
      File.mkdir_p!(folder)
      wheel(folder, "torch", "2.13.0" <> label, context.tag)
    end

    server =
      Port.open({:spawn_executable, context.python}, [:binary, args: ["-c", @server, root]])

    assert_receive {^server, {:data, port}}, 30_000
    "http://127.0.0.1:#{String.trim(port)}"
  end

  defp place(path, folder) do
    File.mkdir_p!(folder)
    File.cp!(path, Path.join(folder, Path.basename(path)))
  end
end
