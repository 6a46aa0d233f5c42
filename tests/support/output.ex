defmodule StarweaveImage.TestOutput do
  @moduledoc "Writes images as a command line does, here or in a process with less rights or room."

  alias StarweaveImage.Output

  @doc """
  Plans and writes so many images of so many bytes; says what came of it: `ok`, how `out` must be, or a code of POSIX.

      iex> StarweaveImage.TestOutput.attempt("/dev/null", 1, false, 3)
      "ok"
  """
  @spec attempt(Path.t(), pos_integer, boolean, pos_integer) :: String.t()
  def attempt(out, count, preview?, size) do
    data = if size == 3, do: "new", else: :binary.copy("n", size)

    with {:ok, %{paths: paths}} <- Output.plan(out, count, preview?),
         nil <- Enum.find(Enum.map(paths, &Output.write(&1, data)), &(&1 != :ok)) do
      "ok"
    else
      {:error, reason} when is_atom(reason) -> Atom.to_string(reason)
      {:error, sentence} -> sentence
    end
  end

  @doc "The same in a process that these words start."
  @spec attempt_under([String.t()], Path.t(), pos_integer, boolean, pos_integer) :: String.t()
  def attempt_under(words, out, count, preview?, size) do
    ebin = :starweave_image |> :code.lib_dir() |> Path.join("ebin")

    call =
      "IO.write(#{inspect(__MODULE__)}.attempt(#{Enum.map_join([out, count, preview?, size], ", ", &inspect/1)}))"

    # A write over the limit fails then, instead of ending the process.
    line = ~s(trap '' XFSZ; exec timeout -s KILL 100 "$@")

    {said, 0} =
      System.cmd("sh", ["-c", line, "sh"] ++ words ++ ["elixir", "-pa", ebin, "-e", call])

    said
  end
end
