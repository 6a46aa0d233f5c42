defmodule Mix.Tasks.Image.Setup do
  @shortdoc "Makes and checks the Python environment of StarweaveImage"

  @moduledoc """
  Makes and checks the Python environment that generates images.

      mix image.setup
      mix image.setup --torch cpu --wheels /media/wheels
      mix image.setup --check

  The first run takes minutes, the next ones seconds. `StarweaveImage.Environment` says which interpreter is used and
  where packages come from; in a release `StarweaveImage.setup()` does the same.

  ## Options

    * `--torch cpu|cuda|rocm` - which build of PyTorch (default: the build for the device that is found; an existing
      environment stays as it is)
    * `--wheels DIR` - a folder of wheels to install from
    * `--python PATH` - the Python to make the environment with
    * `--openvino` - also install what the option `backend: :openvino` of an instance needs
    * `--dev` - also install what the tests of this library need
    * `--check` - only check, install nothing
    * `--if-missing` - do and print nothing if an environment exists

  ## Exit codes

    * 0 - the environment exists and works
    * 1 - it does not, and the last line says why
  """

  use Mix.Task

  alias StarweaveImage.Environment
  alias StarweaveImage.Mix.CommandLine

  @switches [
    torch: :string,
    wheels: :string,
    python: :string,
    openvino: :boolean,
    dev: :boolean,
    check: :boolean,
    if_missing: :boolean
  ]

  @impl true
  def run(argv), do: CommandLine.run(argv, &set_up/1)

  defp set_up(argv) do
    {opts, rest, invalid} = OptionParser.parse(argv, strict: @switches)

    case Enum.map(invalid, &elem(&1, 0)) ++ rest do
      [] ->
        :ok

      [unknown | _] ->
        Mix.raise("mix image.setup does not take #{unknown}; see `mix help image.setup`")
    end

    # A script with Mix.install has no project of its own.
    if Mix.Project.get(), do: Mix.Task.run("compile")

    opts
    |> result()
    |> case do
      {:ok, lines} ->
        Enum.each(lines, &Mix.shell().info(&1))

      {:error, error} ->
        if log = error.details[:log], do: CommandLine.complain("The whole output is in #{log}")
        Enum.each(error.details[:output] || [], &CommandLine.complain("  " <> &1))
        if doctor = error.details[:doctor], do: CommandLine.complain(doctor)
        Mix.raise(Exception.message(error))
    end
  end

  defp result(opts) do
    if opts[:check] do
      with {:ok, report} <- Environment.doctor(), do: {:ok, [report]}
    else
      {if_missing, opts} = Keyword.pop(opts, :if_missing, false)
      {python, opts} = Keyword.pop(opts, :python)
      opts = [base_python: python, check: not if_missing, progress: &progress/1] ++ opts

      with {:ok, report} <- Environment.setup(opts) do
        {:ok, if(if_missing, do: [], else: [report.doctor, "Python: #{report.python}"])}
      end
    end
  end

  defp progress(line), do: Mix.shell().info("[image.setup] " <> line)
end
