defmodule StarweaveImage.Environment do
  @schema [
    torch:
      {{:one_of, [:cpu, :cuda, :rocm]}, nil,
       "Which build of PyTorch. Unless given, an existing environment stays as it is, and a new one " <>
         "gets the build for the device that is found."},
    wheels:
      {{:text, 1, 4096}, nil,
       "A folder of wheels to install from. The index is used too if a wheel is missing. " <>
         "`STARWEAVE_IMAGE_WHEELS` means the same."},
    base_python:
      {{:text, 1, 4096}, nil,
       "The Python to make the environment with. Unless given, `python3`, or else the newest of " <>
         "`python3.14` to `python3.10`."},
    openvino: {:boolean, false, "Also install what `backend: :openvino` needs: 60 MB."},
    dev: {:boolean, false, "Also install what the tests of this library need."},
    check: {:boolean, true, "Run `doctor/1` on it at the end."},
    progress: {{:function, 1}, &IO.puts/1, "Is called with each line about the progress."}
  ]
  @interpreter [python: {{:text, 1, 4096}, nil, ""}]

  @moduledoc """
  The Python environment of the sidecar: how it is found, made and checked.

  `mix image.setup` calls `setup/1`. A release has no Mix tasks and calls the function itself, once on each machine:
  `bin/my_app eval "StarweaveImage.setup()"`. A sidecar only looks for an existing environment, with `python/1`:
  nothing is installed while an application runs.

  ## What is used

    1. the interpreter that the option `python:` of an instance names;
    2. else the one that the variable `STARWEAVE_IMAGE_PYTHON` names;
    3. else the environment that `setup/1` made in the user's cache folder, or in the folder that
       `STARWEAVE_IMAGE_CACHE` names. Each version of this library, and each set of pinned packages, has a
       folder of its own there; you may delete those of versions that you no longer use.

  An interpreter of your own (1 and 2) is used as it is, and needs the packages in `priv/python/requirements.txt`.

  ## Where packages come from

  `uv`, if it is installed, or else `pip` installs them from the index that it is configured for. `priv/python/pins.txt`
  and the lists of the extras have the SHA-256 of every file; a file that differs ends the set-up, wherever it came
  from. PyTorch itself is one exact version, without a hash, and comes from the first of these that has it:

    * a folder of wheels: `wheels:`, `STARWEAVE_IMAGE_WHEELS`, or the folders in `PIP_FIND_LINKS`;
    * PyTorch's own index, if it can be reached (`STARWEAVE_IMAGE_TORCH_INDEX` names a mirror);
    * PyPI, which has one build for each system. On Linux that is the CUDA build, with gigabytes of libraries.

  The libraries of NVIDIA or AMD that this build needs come with it.
  """

  alias StarweaveImage.Environment.{Build, Program}
  alias StarweaveImage.{Error, Options}

  @type torch :: :cpu | :cuda | :rocm

  @typedoc """
  What was set up: the interpreter, its build of PyTorch (nil for an interpreter of your own) and the report of
  `doctor/1` (nil with `check: false`).
  """
  @type report :: %{python: Path.t(), torch: torch | nil, doctor: String.t() | nil}

  @doc """
  The interpreter that a sidecar is started with, or a sentence that says why there is none.

  It looks at a few files and starts nothing.

      iex> StarweaveImage.Environment.python(python: "no-such-python")
      {:error, "the interpreter that the option `python` names is not an executable file"}
  """
  @spec python(keyword) :: {:ok, Path.t()} | {:error, String.t()}
  def python(opts \\ []) do
    case Options.validate(opts, @interpreter) do
      {:ok, %{python: name}} -> interpreter(name)
      {:error, _field, message} -> {:error, message}
    end
  end

  defp interpreter(name) do
    cond do
      name ->
        executable(name, "the option `python`")

      name = Build.variable("STARWEAVE_IMAGE_PYTHON") ->
        executable(name, "STARWEAVE_IMAGE_PYTHON")

      true ->
        with {:ok, kind} <- Build.current(), do: {:ok, Build.interpreter(kind)}
    end
  end

  @doc """
  The folder that the Python package `starweave_image` is in.

      iex> StarweaveImage.Environment.pythonpath() |> Path.join("starweave_image") |> File.dir?()
      true
  """
  @spec pythonpath() :: Path.t()
  defdelegate pythonpath, to: Program

  @doc """
  Makes the environment unless it exists, and checks it.

  The first time takes minutes, later ones seconds. Two calls at once do not disturb each other. An environment that is
  incomplete or damaged is made again.

  #{Options.docs(@schema)}

  Errors: `:invalid_request`, and `:unavailable` with the reason: no Python, no network, no space. Then `details` may
  have `:output` (the last lines), `:log` (the file with the whole output) and `:doctor`.

  ## Example

      {:ok, report} = StarweaveImage.Environment.setup(torch: :cpu)
      IO.puts(report.doctor)

      iex> {:error, error} = StarweaveImage.Environment.setup(torch: :tpu)
      iex> error.message
      "torch must be one of cpu, cuda, rocm, got :tpu"
  """
  @spec setup(keyword) :: {:ok, report} | {:error, Error.t()}
  def setup(opts \\ []) do
    with {:ok, opts} <- validate(opts, @schema) do
      {progress, opts} = Map.pop!(opts, :progress)

      if Build.variable("STARWEAVE_IMAGE_PYTHON"),
        do: checked(nil, opts, progress),
        else: made(opts, progress)
    end
  rescue
    error in [File.Error, File.RenameError] ->
      why = :file.format_error(error.reason)
      unavailable({:error, "the Python environment cannot be written (#{why})"})

    error in ErlangError ->
      unavailable(
        {:error, "a program that makes it cannot be started (#{inspect(error.original)})"}
      )
  end

  @doc """
  Reports the versions and the device of the environment, and what is wrong with it.

  It takes the option `python:` of `python/1`. The report is text for a person; an error has it as `details.doctor`.

      iex> {:error, error} = StarweaveImage.Environment.doctor(python: "no-such-python")
      iex> error.kind
      :unavailable
  """
  @spec doctor(keyword) :: {:ok, String.t()} | {:error, Error.t()}
  def doctor(opts \\ []) do
    with {:ok, %{python: name}} <- validate(opts, @interpreter),
         {:ok, python} <- unavailable(interpreter(name)) do
      {arguments, env} = Program.command(["doctor"])

      case Program.run(python, arguments, env: env, stderr_to_stdout: true) do
        {:error, reason} ->
          unavailable({:error, "Python cannot be started (#{reason}): run `mix image.setup`"})

        {text, 0} ->
          {:ok, String.trim_trailing(text)}

        {text, _status} ->
          message = "the Python environment does not work, as the doctor's report says"
          {:error, Error.new(:unavailable, message, %{doctor: String.trim_trailing(text)})}
      end
    end
  end

  defp validate(opts, schema) do
    with {:error, field, message} <- Options.validate(opts, schema),
         do: {:error, Error.new(:invalid_request, message, %{field: field})}
  end

  defp made(opts, progress) do
    there = with {:ok, kind} <- Build.current(), do: kind, else: (_ -> nil)
    kind = opts.torch || there || Build.device()

    if kind == there and opts.torch == nil and there == :cpu and Build.device() != :cpu do
      progress.(
        "This machine has a GPU that the environment does not use: choose `torch` #{Build.device()}."
      )
    end

    with {:ok, news} <- Build.ensure(kind, opts, progress) do
      result = checked(kind, opts, progress)

      if news == :found and match?({:error, _}, result) and not Build.intact?(kind) do
        progress.("The environment is damaged and is made again")
        Build.remove(kind)
        with {:ok, _} <- Build.ensure(kind, opts, progress), do: checked(kind, opts, progress)
      else
        result
      end
    end
  end

  defp checked(kind, opts, progress) do
    with {:ok, python} <- unavailable(python()) do
      if opts.check do
        progress.("Checking the Python environment")
        with {:ok, text} <- doctor(), do: {:ok, %{python: python, torch: kind, doctor: text}}
      else
        {:ok, %{python: python, torch: kind, doctor: nil}}
      end
    end
  end

  defp unavailable({:error, sentence}), do: {:error, Error.new(:unavailable, sentence)}
  defp unavailable(ok), do: ok

  defp executable(name, source) do
    case System.find_executable(name) do
      nil -> {:error, "the interpreter that #{source} names is not an executable file"}
      path -> {:ok, path}
    end
  end
end
