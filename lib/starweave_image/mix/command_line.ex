defmodule StarweaveImage.Mix.CommandLine do
  @moduledoc false

  # What all Mix tasks of this library share: arguments are the bytes that were typed, and a failing output (`| head`, a
  # full disk, a stream that was closed from the start) loses no work.

  @doc "Calls `fun` with the arguments of a task; failures to print are ignored during the call."
  @spec run([String.t()], ([String.t()] -> result)) :: result when result: term
  def run(argv, fun) do
    leader = Process.group_leader()
    without_locale? = :file.native_name_encoding() == :latin1
    # So that arguments are also printed as they were typed.
    if without_locale?,
      do: for(device <- [leader, :standard_error], do: :io.setopts(device, encoding: :unicode))

    # It stays after the call, since processes that were started during it keep it as their group leader.
    Process.group_leader(self(), spawn(fn -> forward(leader) end))

    try do
      typed = if without_locale?, do: System.argv(), else: []
      fun.(Enum.map(argv, &if(&1 in typed, do: bytes(&1), else: &1)))
    after
      Process.group_leader(self(), leader)
    end
  end

  @doc "Prints a line on the standard error, if there is one."
  @spec complain(String.t()) :: :ok
  def complain(line) do
    Mix.shell().error(line)
  rescue
    _gone in [ErlangError, ArgumentError] -> :ok
  end

  # Each byte has become a character of its own.
  defp bytes(argument) do
    case :unicode.characters_to_binary(argument, :utf8, :latin1) do
      bytes when is_binary(bytes) -> bytes
      _no_bytes -> argument
    end
  end

  # A group leader in front of another one, which hides failures to print.
  defp forward(leader) do
    receive do
      {:io_request, from, reference, request} ->
        send(from, {:io_reply, reference, forwarded(leader, request)})

      _other ->
        :ok
    end

    forward(leader)
  end

  defp forwarded(leader, request) do
    monitor = Process.monitor(leader)
    send(leader, {:io_request, self(), monitor, request})

    receive do
      {:io_reply, ^monitor, reply} ->
        Process.demonitor(monitor, [:flush])
        if print?(request) and match?({:error, _}, reply), do: lost(), else: reply

      {:DOWN, ^monitor, _, _, _} ->
        if print?(request), do: lost(), else: {:error, :terminated}
    end
  end

  defp print?(request), do: elem(request, 0) in [:put_chars, :requests]

  # The console of Logger prints to the same place, and would say at length that it cannot.
  defp lost do
    if Process.whereis(:user) == nil, do: Logger.configure(level: :none)
    :ok
  end
end
