defmodule StarweaveImage.Command do
  @moduledoc """
  A Mix task as a user runs it: in a process of its own, in a pipe or on a terminal, with signals. What belongs
  to a command is found in /proc by the name of its own temporary folder.
  """

  import ExUnit.Assertions
  import ExUnit.Callbacks, only: [on_exit: 1]

  @deadline_ms 120_000
  @lifetime_s 180

  defstruct [:port, :folder, output: "", status: nil]

  @type t :: %__MODULE__{port: port, folder: Path.t(), output: binary, status: integer | nil}

  @doc """
  Starts `mix` with these arguments, in which FOLDER stands for the command's folder.

  `terminal: true` gives it a terminal; `env:` adds to the environment; `stdout:` says in words of the shell where that
  goes; stderr goes to FOLDER/stderr unless it is on a terminal.
  """
  @spec start([String.t()], keyword) :: t
  def start(args, opts \\ []) do
    # Short: the path of a unix socket below it has little room.
    folder = Path.join("/tmp", "swi-#{System.pid()}-#{System.unique_integer([:positive])}")
    File.mkdir!(folder)

    on_exit(fn ->
      for {pid, _} <- processes(folder), do: signal(pid, "KILL")
      File.rm_rf!(folder)
    end)

    words = Enum.map_join(["mix" | args], " ", &quoted(String.replace(&1, "FOLDER", folder)))

    line =
      if opts[:terminal],
        do:
          "exec timeout -s KILL #{@lifetime_s} script -qefc #{quoted("exec " <> words)} /dev/null",
        else:
          "exec timeout -s KILL #{@lifetime_s} #{words} 2> #{quoted(folder <> "/stderr")} #{opts[:stdout]}"

    env = [{"TMPDIR", folder}, {"MIX_ENV", "#{Mix.env()}"} | Keyword.get(opts, :env, [])]

    port =
      Port.open({:spawn_executable, "/bin/sh"}, [
        :binary,
        :exit_status,
        args: ["-c", line],
        env: for({name, value} <- env, do: {String.to_charlist(name), String.to_charlist(value)})
      ])

    %__MODULE__{port: port, folder: folder}
  end

  @doc "Runs a command to its end."
  @spec run([String.t()], keyword) :: t
  def run(args, opts \\ []), do: args |> start(opts) |> await_exit()

  @doc "Waits until the command has written this."
  @spec await_output(t, String.t()) :: t
  def await_output(command, text) do
    if command.output =~ text do
      command
    else
      command = next(command)
      assert command.status == nil, "the command ended without #{inspect(text)}: #{said(command)}"
      await_output(command, text)
    end
  end

  @spec await_exit(t) :: t
  def await_exit(%{status: nil} = command), do: command |> next() |> await_exit()
  def await_exit(command), do: command

  @spec type(t, binary) :: t
  def type(command, keys) do
    Port.command(command.port, keys)
    command
  end

  @spec stderr(t) :: String.t()
  def stderr(command), do: File.read!(Path.join(command.folder, "stderr"))

  @doc "The processes of a command whose command line has this text: the VM, Python, `script`."
  @spec pids(t, String.t()) :: [pos_integer]
  def pids(command, text) do
    for {pid, line} <- processes(command.folder), line =~ text, do: pid
  end

  @spec signal(pos_integer, String.t()) :: :ok
  def signal(pid, signal) do
    System.cmd("sh", ["-c", "kill -s #{signal} #{pid} 2>/dev/null"])
    :ok
  end

  @doc "Waits until nothing of the command is left, and says how long that took in ms."
  @spec await_gone(t) :: non_neg_integer
  def await_gone(command, since \\ now()) do
    left = processes(command.folder)

    cond do
      left == [] ->
        now() - since

      now() - since > 30_000 ->
        flunk("left behind: #{inspect(left)}")

      true ->
        receive do
        after
          20 -> await_gone(command, since)
        end
    end
  end

  defp next(%{port: port} = command) do
    receive do
      {^port, {:data, bytes}} -> %{command | output: command.output <> bytes}
      {^port, {:exit_status, status}} -> %{command | status: status}
    after
      @deadline_ms -> flunk("nothing came within #{@deadline_ms} ms: #{said(command)}")
    end
  end

  defp said(command) do
    case File.read(Path.join(command.folder, "stderr")) do
      {:ok, stderr} -> command.output <> stderr
      {:error, _on_a_terminal} -> command.output
    end
  end

  defp processes(folder) do
    for entry <- File.ls!("/proc"),
        entry =~ ~r/^\d+$/,
        {:ok, line} <- [File.read("/proc/#{entry}/cmdline")],
        String.contains?(line, folder),
        do: {String.to_integer(entry), String.replace(line, "\0", " ")}
  end

  defp quoted(word), do: "'" <> String.replace(word, "'", "'\\''") <> "'"
  defp now, do: System.monotonic_time(:millisecond)
end
