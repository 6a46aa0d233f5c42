defmodule StarweaveImage.TestOSProcess do
  @moduledoc """
  Operating system processes by their id, from /proc, for tests that prove who died and who did not.

      iex> StarweaveImage.TestOSProcess.alive?(String.to_integer(System.pid()))
      true
  """

  @spec alive?(pos_integer) :: boolean
  # One that only waits for its parent to ask about it is dead.
  def alive?(pid), do: match?(%{state: state} when state not in ["Z", "X"], read(pid))

  @doc "Who is alive in the process group of `leader`, or has it in its line of parents."
  @spec family(pos_integer) :: [pos_integer]
  def family(leader) do
    all = for pid <- all(), process = read(pid), process.state not in ["Z", "X"], do: process
    parents = Map.new(all, &{&1.pid, &1.parent})
    for p <- all, p.group == leader or descends?(p.pid, leader, parents), do: p.pid
  end

  defp descends?(leader, leader, _parents), do: true

  defp descends?(pid, leader, parents) when is_map_key(parents, pid),
    do: descends?(parents[pid], leader, parents)

  defp descends?(_pid, _leader, _parents), do: false

  @spec signal(pos_integer, String.t()) :: :ok
  def signal(pid, signal) do
    {_, 0} = System.cmd("/bin/sh", ["-c", "kill -s #{signal} #{pid}"])
    :ok
  end

  @doc "Waits until none of them is alive; gives those that are left at the deadline."
  @spec await_gone([pos_integer], timeout_ms :: pos_integer) :: [pos_integer]
  def await_gone(pids, timeout) do
    await(fn -> not Enum.any?(pids, &alive?/1) end, timeout)
    Enum.filter(pids, &alive?/1)
  end

  @doc "Asks until the answer is true or the time is over; gives the last answer."
  @spec await(fun, timeout_ms :: pos_integer) :: term
  def await(condition, timeout \\ 30_000) do
    deadline = System.monotonic_time(:millisecond) + timeout
    poll(condition, deadline)
  end

  defp poll(condition, deadline) do
    answer = condition.()

    if answer || System.monotonic_time(:millisecond) > deadline do
      answer
    else
      Process.sleep(10)
      poll(condition, deadline)
    end
  end

  defp all do
    for name <- File.ls!("/proc"), {pid, ""} <- [Integer.parse(name)], do: pid
  end

  defp read(pid) do
    with {:ok, stat} <- File.read("/proc/#{pid}/stat") do
      # The name, in parentheses, may hold anything.
      [_, fields] = Regex.run(~r/.*\) (.*)/s, stat)
      [state, parent, group | _] = String.split(fields)

      %{
        pid: pid,
        state: state,
        parent: String.to_integer(parent),
        group: String.to_integer(group)
      }
    else
      {:error, _gone} -> nil
    end
  end
end
