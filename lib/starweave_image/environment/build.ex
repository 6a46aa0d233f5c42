defmodule StarweaveImage.Environment.Build do
  @moduledoc false

  # The environments in the cache: where they are, whether they are whole, and how one is made.
  #
  #     CACHE/VERSION-HASH/         one for each version of this library and set of pins
  #       current                   the kind that was asked for last
  #       lock, setup.log
  #       cpu/ cuda/ rocm/          virtual environments; in each, the file `complete` is written last
  #
  # A virtual environment holds absolute paths, so it is made in place and never moved.

  alias StarweaveImage.Environment.Program
  alias StarweaveImage.Error

  @type kind :: :cpu | :cuda | :rocm

  @source Path.expand("../../../priv/python", __DIR__)
  @files Enum.map(
           ~w(constraints.txt pins.txt pins-openvino.txt pins-dev.txt),
           &Path.join(@source, &1)
         )
  for file <- @files, do: @external_resource(file)

  @pins Enum.map(@files, &File.read!/1)
  @edition "#{Mix.Project.config()[:version]}-" <>
             (:crypto.hash(:sha256, @pins) |> binary_part(0, 4) |> Base.encode16(case: :lower))
  @torch ~r/^torch==(\S+)/m |> Regex.run(hd(@pins)) |> List.last()

  @kinds [:cpu, :cuda, :rocm]
  @names %{cpu: "the CPU", cuda: "CUDA", rocm: "ROCm"}
  @minors 10..14
  @pythons ["python3" | for(minor <- Enum.reverse(@minors), do: "python3.#{minor}")]
  @extras [dev: "the tools of the tests", openvino: "OpenVINO"]
  @any %{dev: false, openvino: false, base_python: nil}
  @torch_index "https://download.pytorch.org/whl"

  # CUDA 13 needs NVIDIA's driver 580; every CUDA 12 runs from driver 525 on.
  @cuda13_driver 580
  @indexes %{
    cpu: ~w(cpu),
    cuda: ~w(cu130 cu129 cu128 cu126),
    cuda12: ~w(cu129 cu128 cu126),
    rocm: ~w(rocm7.2 rocm7.1 rocm7.0 rocm6.4)
  }

  # Settings of the user's pip that would install packages outside of the environment.
  @env [
    {"PYTHONPATH", nil},
    {"PYTHONHOME", nil},
    {"PYTHONDONTWRITEBYTECODE", nil},
    {"VIRTUAL_ENV", nil},
    {"PIP_TARGET", nil},
    {"PIP_PREFIX", nil},
    {"PIP_USER", "0"},
    {"PIP_QUIET", "0"},
    {"PIP_NO_INPUT", "1"},
    {"PIP_PROGRESS_BAR", "off"},
    {"PIP_DISABLE_PIP_VERSION_CHECK", "1"},
    {"UV_NO_PROGRESS", "1"}
  ]

  # How long a command may print nothing before the caller is told that it still runs.
  @still_ms 20_000

  # Ends the whole process group of the command, whose leader is this shell, when the BEAM ends.
  @until_eof """
  exec 3<&0
  "$@" </dev/null 3<&- &
  command=$!
  (read -r _ <&3; kill -s TERM 0) >/dev/null 2>&1 &
  guard=$!
  wait "$command"
  status=$?
  kill "$guard"
  exit "$status"
  """

  @doc "The kind of the complete environment that was asked for last, or a sentence about why there is none."
  @spec current() :: {:ok, kind} | {:error, String.t()}
  def current do
    with {:ok, root} <- root(),
         {:ok, name} <- File.read(Path.join(root, "current")),
         kind when kind != nil <- Enum.find(@kinds, &(Atom.to_string(&1) == name)),
         true <- complete?(kind, @any) do
      {:ok, kind}
    else
      {:error, sentence} when is_binary(sentence) ->
        {:error, sentence}

      {:error, reason} when reason not in [:enoent, :enotdir] ->
        {:error, "the Python environment cannot be read (#{:file.format_error(reason)})"}

      _ ->
        {:error,
         "the Python environment is not set up: run `mix image.setup` (in a release: StarweaveImage.setup())"}
    end
  end

  @spec interpreter(kind) :: Path.t()
  def interpreter(kind), do: Path.join(folder(kind), "bin/python")

  @doc "A variable of the system's environment; an empty one counts as not set."
  @spec variable(String.t()) :: String.t() | nil
  def variable(name), do: with("" <- System.get_env(name), do: nil)

  @doc "The kind that suits this machine."
  @spec device() :: kind
  def device do
    cond do
      nvidia?() -> :cuda
      File.exists?("/dev/kfd") and (program?("rocminfo") or File.dir?("/opt/rocm")) -> :rocm
      true -> :cpu
    end
  end

  @doc "Makes the environment of a kind unless it is complete, and makes it current; says whether it was complete."
  @spec ensure(kind, map, (String.t() -> any)) ::
          {:ok, :found | :made} | {:error, Error.t()}
  def ensure(kind, opts, progress) do
    with :ok <- known(),
         {:ok, chosen} <- if(opts.base_python, do: base([opts.base_python]), else: {:ok, nil}) do
      opts = %{opts | base_python: chosen}

      if complete?(kind, opts) do
        publish(kind)
        {:ok, :found}
      else
        with {:ok, base} <- if(chosen, do: {:ok, chosen}, else: base(@pythons)),
             :ok <- writable(),
             :ok <- locked(base, progress, fn -> make(kind, base, opts, progress) end) do
          publish(kind)
          {:ok, :made}
        end
      end
    end
  end

  @doc "Whether its packages can be imported."
  @spec intact?(kind) :: boolean
  def intact?(kind) do
    imports =
      "import accelerate, diffusers, msgspec, numpy, peft, PIL, safetensors, torch, transformers"

    match?(
      {_, 0},
      Program.run(interpreter(kind), ["-I", "-c", imports], env: @env, stderr_to_stdout: true)
    )
  end

  @spec remove(kind) :: :ok
  def remove(kind) do
    File.rm_rf!(folder(kind))
    :ok
  end

  # The only place that asks for the user's cache folder. A user without a home may have none, and if the working
  # folder was removed, a relative name means nothing.
  defp root do
    named = variable("STARWEAVE_IMAGE_CACHE")

    cond do
      named -> {:ok, Path.join(Path.expand(named), @edition)}
      variable("XDG_CACHE_HOME") || variable("HOME") -> {:ok, Path.join(user_cache(), @edition)}
      true -> {:error, no_cache("HOME is not set")}
    end
  rescue
    _ -> {:error, no_cache("STARWEAVE_IMAGE_CACHE is no absolute path")}
  end

  defp user_cache, do: :user_cache |> :filename.basedir("starweave_image") |> Path.expand()

  defp no_cache(why) do
    "no folder for the Python environment is known, since #{why}: name one in STARWEAVE_IMAGE_CACHE, " <>
      "or an interpreter in STARWEAVE_IMAGE_PYTHON"
  end

  defp known, do: with({:error, sentence} <- root(), do: failed(sentence), else: (_ -> :ok))

  # For the functions below, which are called only where there is a folder.
  defp root!, do: root() |> elem(1)
  defp folder(kind), do: Path.join(root!(), Atom.to_string(kind))
  defp log, do: Path.join(root!(), "setup.log")

  # An environment does not outlive the Python that it was made with.
  defp complete?(kind, %{base_python: chosen} = opts) do
    marks = marks(kind)

    marks != [] and File.exists?(marks[:base]) and File.exists?(interpreter(kind)) and
      missing(opts, marks) == [] and (chosen == nil or chosen.path == marks[:base])
  end

  defp missing(opts, marks),
    do: for({extra, _} <- @extras, opts[extra] && !marks[extra], do: extra)

  defp marks(kind) do
    case :file.consult(Path.join(folder(kind), "complete")) do
      {:ok, marks} -> marks
      {:error, _} -> []
    end
  end

  defp mark(kind, marks) do
    write(
      Path.join(folder(kind), "complete"),
      for(mark <- marks, do: :io_lib.format("~p.~n", [mark]))
    )
  end

  defp publish(kind) do
    if current() != {:ok, kind}, do: write(Path.join(root!(), "current"), Atom.to_string(kind))
  end

  defp write(path, content) do
    new = "#{path}.#{System.pid()}.#{System.unique_integer([:positive])}"
    File.write!(new, content)
    File.rename!(new, path)
  end

  defp nvidia? do
    case System.find_executable("nvidia-smi") do
      nil -> Path.wildcard("/dev/nvidia[0-9]*") != []
      smi -> match?({"GPU " <> _, 0}, Program.run(smi, ["-L"], stderr_to_stdout: true))
    end
  end

  defp program?(name), do: System.find_executable(name) != nil

  # The Python to make it with

  defp base(names) do
    found = for name <- names, base = describe(name), do: base

    cond do
      base = Enum.find(found, &usable?/1) -> {:ok, base}
      Enum.any?(found, &supported?/1) -> failed(no_venv())
      found != [] -> failed("#{wanted()} is needed, and this is #{hd(found).version}")
      names == @pythons -> failed("Python is not installed: #{wanted()} is needed")
      true -> failed("the interpreter that `base_python` names is no Python 3")
    end
  end

  defp describe(name) do
    with path when path != nil <- System.find_executable(name),
         {text, 0} <- Program.run(path, bootstrap(["describe"]), stderr_to_stdout: true) do
      facts =
        for [_, key, value] <- Regex.scan(~r/^(\w+) (.+)$/m, text), into: %{}, do: {key, value}

      %{
        path: facts["executable"],
        version: facts["version"],
        linux?: facts["system"] == "linux",
        venv?: Map.has_key?(facts, "venv")
      }
    else
      _ -> nil
    end
  end

  defp supported?(base), do: base.version in Enum.map(@minors, &"3.#{&1}")
  defp usable?(base), do: supported?(base) and (base.venv? or program?("uv"))
  defp wanted, do: "Python 3.#{@minors.first} to 3.#{@minors.last}"

  defp no_venv do
    "Python has no `venv` module: install it (Debian, Ubuntu: `apt-get install python3-venv`) or `uv`"
  end

  # Making it

  defp make(kind, base, opts, progress) do
    cond do
      complete?(kind, opts) ->
        :ok

      complete?(kind, %{@any | base_python: opts.base_python}) ->
        marks = marks(kind)
        missing = missing(opts, marks)
        for extra <- missing, do: progress.("Installing #{@extras[extra]}")

        with :ok <- packages(kind, Enum.map(missing, &"pins-#{&1}.txt"), opts, progress),
             do: mark(kind, Keyword.merge(marks, for(extra <- missing, do: {extra, true})))

      true ->
        progress.(
          "Making a Python #{base.version} environment, PyTorch for #{@names[kind]}: minutes, once"
        )

        remove(kind)

        lists = ["pins.txt" | Enum.map(missing(opts, []), &"pins-#{&1}.txt")]

        # torch comes last. Its index has other versions of some packages of PyPI; since the pinned ones are installed
        # by then, that index is asked only for torch and the libraries that this build needs.
        with {:ok, torch, folder} <- torch(kind, base, opts, progress),
             :ok <- virtual_environment(kind, base, progress),
             _ = progress.("Installing the packages"),
             :ok <- packages(kind, lists, opts, progress),
             _ = progress.("Installing PyTorch"),
             :ok <- install(kind, torch, folder, progress) do
          mark(kind, [base: base.path] ++ for({extra, _} <- @extras, do: {extra, opts[extra]}))
        else
          error ->
            remove(kind)
            error
        end
    end
  end

  defp virtual_environment(kind, base, progress) do
    command =
      if uv = System.find_executable("uv"),
        do: [uv, "venv", "--no-project", "--python", base.path, folder(kind)],
        else: [base.path, "-I", "-m", "venv", folder(kind)]

    run(command, "the Python environment could not be made", progress)
  end

  # Decides the source and the exact build of torch before anything is downloaded.
  defp torch(kind, base, opts, progress) do
    folders = Enum.filter([wheels(opts) | words("PIP_FIND_LINKS")], &(&1 && File.dir?(&1)))
    arguments = ["torch", Atom.to_string(kind), @torch | folders ++ indexes(kind, base)]
    {line, _status} = System.cmd(base.path, bootstrap(arguments))

    case line |> String.trim() |> String.split(" ", parts: 2) do
      [version, "http" <> _ = index] ->
        progress.("PyTorch is #{version}, from #{index}")
        {:ok, ["torch==#{version}", "--index-url", index], nil}

      [version, folder] ->
        progress.("PyTorch is #{version}, from a folder of wheels")
        {:ok, ["torch==#{version}"], folder}

      [""] when kind == :rocm ->
        failed(
          "PyTorch's own index, the only one with builds for ROCm, cannot be reached: " <>
            "name a folder of wheels, or choose the CPU"
        )

      [""] ->
        progress.(
          "PyTorch is #{@torch}, from where pip is configured to look, since its own index cannot be reached"
        )

        if kind == :cpu and base.linux? do
          progress.(
            "  PyPI's build brings 3 GB for CUDA that this machine has no use for; " <>
              "a folder of wheels with the CPU build avoids it"
          )
        end

        # `===`, so that a CPU build in a folder of pip's configuration does not match.
        {:ok, ["torch#{if kind == :cuda, do: "===", else: "=="}#{@torch}"], nil}
    end
  end

  defp indexes(kind, base) do
    mirror = variable("STARWEAVE_IMAGE_TORCH_INDEX") || @torch_index

    names = if base.linux? and !variable("PIP_NO_INDEX"), do: @indexes[generation(kind)], else: []
    for name <- names, do: "#{String.trim_trailing(mirror, "/")}/#{name}"
  end

  defp generation(:cuda) do
    with {:ok, text} <- File.read("/proc/driver/nvidia/version"),
         [_, major] <- Regex.run(~r/\s(\d{3})\.\d+/, text),
         true <- String.to_integer(major) < @cuda13_driver do
      :cuda12
    else
      _ -> :cuda
    end
  end

  defp generation(kind), do: kind

  # The lists are complete: a package that is not in them, or whose file has another hash, is not installed. Only
  # wheels are installed, since the packages that build a source distribution are in no list.
  defp packages(kind, lists, opts, progress) do
    lists = Enum.flat_map(lists, &["-r", in_priv(&1)])
    exactly = ["--no-deps", "--require-hashes", "--only-binary", ":all:"]
    install(kind, exactly ++ lists, wheels(opts), progress)
  end

  defp install(kind, wanted, nil, progress) do
    installer =
      case System.find_executable("uv") do
        nil -> [interpreter(kind), "-I", "-m", "pip", "install"]
        uv -> [uv, "pip", "install", "--compile-bytecode", "--python", interpreter(kind)]
      end

    run(installer ++ wanted, "the Python packages could not be installed", progress)
  end

  # A folder that has everything is used alone: the same result with and without a network.
  defp install(kind, wanted, folder, progress) do
    wanted = wanted ++ ["--find-links", Path.expand(folder)]

    with {:error, _} <- install(kind, wanted ++ ["--no-index"], nil, fn _ -> :ok end),
         do: install(kind, wanted, nil, progress)
  end

  defp wheels(opts), do: opts.wheels || variable("STARWEAVE_IMAGE_WHEELS")
  defp words(name), do: String.split(variable(name) || "")
  defp in_priv(file), do: Path.join(Program.pythonpath(), file)
  defp bootstrap(arguments), do: ["-I", in_priv("bootstrap.py") | arguments]

  # Running commands

  # Their output goes to the log; the caller is told of large downloads, and that a command still runs.
  defp run([program | arguments], failure, progress) do
    port =
      Port.open({:spawn_executable, "/bin/sh"}, [
        :binary,
        :exit_status,
        :stderr_to_stdout,
        {:line, 4096},
        args: ["-c", @until_eof, "sh", program | arguments],
        env:
          for(
            {name, value} <- @env,
            do: {to_charlist(name), if(value, do: to_charlist(value), else: false)}
          )
      ])

    File.open!(log(), [:append], fn log ->
      IO.binwrite(log, ["$ ", Enum.intersperse([program | arguments], " "), "\n"])
      follow(port, log, [], progress)
    end)
    |> case do
      {0, _lines} ->
        :ok

      {_status, lines} ->
        {why, details} = reason(Enum.reverse(lines))
        {:error, Error.new(:unavailable, "#{failure}: #{why}", Map.put(details, :log, log()))}
    end
  end

  defp follow(port, log, lines, progress) do
    receive do
      {^port, {:data, {_, line}}} ->
        IO.binwrite(log, [line, "\n"])

        with [_, name, size] <-
               Regex.run(~r/Downloading (\S+?)(?:-\d\S*)? \((\d+\.?\d* ?[MG]i?B)\)/, line),
             do: progress.("  #{name} (#{size})")

        follow(port, log, [line | Enum.take(lines, 200)], progress)

      {^port, {:exit_status, status}} ->
        {status, lines}
    after
      @still_ms ->
        progress.("  ...")
        follow(port, log, lines, progress)
    end
  end

  # A function, since newer Erlangs cannot keep a regex in a module attribute.
  defp reasons do
    [
      {~r/No space left/, "the disk is full"},
      {~r/CERTIFICATE_VERIFY_FAILED|invalid peer certificate/,
       "the certificate of the package index is not trusted here; install ca-certificates or set SSL_CERT_FILE"},
      {~r/ensurepip/,
       "the module `venv` is incomplete; on Debian and Ubuntu install python3-venv"},
      {~r/NewConnectionError|NameResolutionError|ConnectTimeout|ProxyError|dns error|Connection refused|Could not connect/i,
       "no package index can be reached; check the network and the proxy settings, or name a folder of wheels"},
      {~r/No matching distribution|ResolutionImpossible|No solution found/,
       "the index or folder lacks a version that is needed for this Python and this machine"}
    ]
  end

  # With the last lines of output, since the sentence alone may not be enough.
  defp reason(lines) do
    text = Enum.join(lines, "\n")

    case Regex.run(mismatch(), text, capture: :all_but_first) do
      [package] ->
        {"the file found for #{package} is not the pinned one (its SHA-256 differs)", %{}}

      nil ->
        known = Enum.find_value(reasons(), fn {pattern, why} -> if text =~ pattern, do: why end)
        {known || "the last lines of the log say why", %{output: Enum.take(lines, -20)}}
    end
  end

  # The messages of pip and of uv.
  defp mismatch,
    do: ~r/(?:DO NOT MATCH THE HASHES.*\n\s+|Hash mismatch for `)([\w.-]+)/

  # The kernel's lock, held by a process that ends with this one, however either ends.
  defp locked(base, progress, work) do
    port =
      Port.open({:spawn_executable, base.path}, [
        :binary,
        {:line, 80},
        :exit_status,
        args: bootstrap(["lock", Path.join(root!(), "lock")])
      ])

    with :ok <- await_lock(port, progress) do
      try do
        work.()
      after
        Port.close(port)
      end
    end
  end

  defp await_lock(port, progress) do
    receive do
      {^port, {:data, {:eol, "locked"}}} ->
        :ok

      {^port, {:data, {:eol, "waiting"}}} ->
        progress.("Waiting for another set-up to end")
        await_lock(port, progress)

      {^port, {:exit_status, _}} ->
        failed("the cache folder of the Python environment cannot be locked")
    end
  end

  defp writable do
    with {:error, reason} <- File.mkdir_p(root!()) do
      failed(
        "the cache folder of the Python environment cannot be written (#{:file.format_error(reason)}): " <>
          "name another one with STARWEAVE_IMAGE_CACHE"
      )
    end
  end

  defp failed(sentence), do: {:error, Error.new(:unavailable, sentence)}
end
