defmodule StarweaveImage.TestApplication do
  @moduledoc """
  An application in a BEAM of its own (tests/support/application.exs), for tests that end it.

      iex> Code.ensure_loaded?(StarweaveImage.TestApplication)
      true
  """

  import ExUnit.Assertions

  alias StarweaveImage.TestOSProcess

  @scripts __DIR__
  @misbehaviour Path.expand("python", __DIR__)

  @enforce_keys [:output, :beam]
  defstruct [:output, :beam]

  @doc "Starts it; `args` are those of the script. Ends by itself after five minutes at the latest."
  def start(folder, script \\ "application.exs", args) do
    output = Path.join(folder, "output-#{System.unique_integer([:positive])}")
    ebin = :starweave_image |> :code.lib_dir() |> Path.join("ebin")
    # Its own standard streams: a child that gets stuck must not hold those of the tests.
    command = ~s(exec timeout -s KILL 300 elixir -pa "$0" "$@" >'#{output}' 2>&1 </dev/null)
    arguments = ["-c", command, ebin, Path.join(@scripts, script) | args]
    Port.open({:spawn_executable, "/bin/sh"}, [:nouse_stdio, args: arguments])
    [_, pid] = await_output(output, ~r/^beam (\d+)$/m)
    %__MODULE__{output: output, beam: String.to_integer(pid)}
  end

  @doc "Waits until the sidecar's process is known; gives its id."
  def sidecar(application) do
    [_, pid] = await_line(application, ~r/^sidecar (\d+) /m)
    String.to_integer(pid)
  end

  @doc "Waits for what matches in the output; gives the match."
  def await_line(application, regex), do: await_output(application.output, regex)

  defp await_output(path, regex) do
    read = fn -> with {:ok, text} <- File.read(path), do: text, else: (_ -> "") end
    match = TestOSProcess.await(fn -> Regex.run(regex, read.()) end, 240_000)
    assert match, "no #{inspect(regex)} in:\n#{read.()}"
    match
  end

  @doc """
  A Python that runs `python`, but on SIGUSR1 goes into native code that holds the interpreter, and
  says "holding" in its log.
  """
  def holding(folder, python), do: misbehaving(folder, python, "hold_interpreter")

  @doc "A Python that runs `python`, with this misbehaviour of tests/support/python/sitecustomize.py."
  @spec misbehaving(Path.t(), Path.t(), String.t()) :: Path.t()
  def misbehaving(folder, python, misbehaviour) do
    path = Path.join(folder, "#{misbehaviour}-python")

    File.write!(path, """
    #!/bin/sh
    export PYTHONPATH='#{@misbehaviour}'"${PYTHONPATH:+:$PYTHONPATH}" STARWEAVE_TEST_MISBEHAVIOUR=#{misbehaviour}
    exec '#{python}' "$@"
    """)

    File.chmod!(path, 0o755)
    path
  end
end
