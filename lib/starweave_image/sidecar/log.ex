defmodule StarweaveImage.Sidecar.Log do
  @moduledoc false
  # Passes the output of a sidecar and all its children on fds 1 and 2 to Logger, as lines. It comes by a unix socket: a
  # port that uses fds 3 and 4 would leave 1 and 2 on the application's terminal.
  #
  # The receive loop is GenServer's, and no function here blocks: a process that waits inside a module is killed when
  # that module is reloaded for the second time, which happens all day in development.

  use GenServer
  use StarweaveImage.CrashLog
  require Logger

  alias StarweaveImage.Scratch

  @enforce_keys [:reader, :folder, :socket]
  defstruct [:reader, :folder, :socket]

  @type t :: %__MODULE__{reader: pid, folder: Path.t(), socket: Path.t()}

  @lines_per_second 500
  @accept_ms 50
  @longest_line 65_536
  # The exit reason of a reader that has read everything; the owner treats any other reason as a fault.
  @over {:shutdown, :nobody_writes}

  @doc "The exit reason of a reader that has no writer any more."
  @spec over() :: term
  def over, do: @over

  @doc "Listens at `socket` for the sidecar's connection; the socket's file is removed once that is made."
  @spec start_link(atom, non_neg_integer) :: {:ok, t} | {:error, String.t()}
  def start_link(instance, index) do
    with {:ok, folder} <- Scratch.create() do
      socket = Path.join(folder, "log")

      # Linked, but not by `start_link`: a gen_server ends with its parent, and this one must still read what is left.
      case GenServer.start(__MODULE__, {self(), instance, index, folder, socket}) do
        {:ok, reader} ->
          {:ok, %__MODULE__{reader: reader, folder: folder, socket: socket}}

        {:error, {:shutdown, reason}} ->
          Scratch.remove(folder)
          {:error, sentence(reason)}
      end
    else
      {:error, reason} -> {:error, sentence(reason)}
    end
  end

  @doc "Ends a reader without a connection; one that is connected reads to the last line."
  @spec stop(t) :: :ok
  def stop(log) do
    # Removed by the caller: the reader may not get to run again.
    Scratch.remove(log.folder)
    GenServer.cast(log.reader, :stop)
  end

  defp sentence(reason) do
    why = if is_atom(reason), do: :file.format_error(reason), else: inspect(reason)
    hint = if reason in [:emfile, :enfile], do: "", else: ": TMPDIR may name another"

    "no socket for the log of Python can be made in the folder for temporary files (#{why})#{hint}"
  end

  @impl true
  def init({owner, instance, index, folder, socket}) do
    # The end of the sidecar's owner must not cut off the last lines, nor leave the folder behind.
    Process.flag(:trap_exit, true)
    Process.link(owner)
    Logger.metadata(instance: instance)

    options = [
      :binary,
      ifaddr: {:local, socket},
      packet: :line,
      buffer: @longest_line,
      active: false
    ]

    case :gen_tcp.listen(0, options) do
      {:ok, listener} ->
        send(self(), :accept)

        {:ok,
         %{
           listener: listener,
           socket: nil,
           folder: folder,
           prefix: "image sidecar #{index} | ",
           second: second(),
           lines: 0
         }}

      {:error, reason} ->
        {:stop, {:shutdown, reason}}
    end
  end

  @impl true
  def handle_info(:accept, %{socket: nil} = state) do
    case accept(state) do
      {:error, :timeout} ->
        Process.send_after(self(), :accept, @accept_ms)
        {:noreply, state}

      accepted_or_not ->
        accepted_or_not
    end
  end

  def handle_info({:tcp, socket, line}, %{socket: socket} = state) do
    state = count(state)
    if state.lines <= @lines_per_second, do: Logger.info([state.prefix, printable(line)])
    _ = :inet.setopts(socket, active: :once)
    {:noreply, state}
  end

  def handle_info({:tcp_closed, socket}, %{socket: socket} = state),
    do: {:stop, @over, tell_dropped(state)}

  def handle_info({:tcp_error, socket, _reason}, %{socket: socket} = state),
    do: {:stop, @over, tell_dropped(state)}

  # The owner has ended. Stop only if there is no connection yet; a connection is read to the end.
  def handle_info({:EXIT, pid, _reason}, %{socket: nil} = state) when is_pid(pid),
    do: handle_cast(:stop, state)

  def handle_info(_message, state), do: {:noreply, state}

  @impl true
  def handle_cast(:stop, %{socket: nil} = state) do
    # The sidecar may have connected, and ended, since the last check.
    with {:error, :timeout} <- accept(state), do: {:stop, @over, state}
  end

  def handle_cast(:stop, state), do: {:noreply, state}

  defp accept(state) do
    case :gen_tcp.accept(state.listener, 0) do
      {:ok, socket} ->
        Scratch.remove(state.folder)
        :ok = :gen_tcp.close(state.listener)
        _ = :inet.setopts(socket, active: :once)
        {:noreply, %{state | socket: socket, listener: nil}}

      {:error, :timeout} ->
        {:error, :timeout}

      {:error, _closed} ->
        {:stop, @over, state}
    end
  end

  @impl true
  def terminate(_reason, state), do: Scratch.remove(state.folder)

  # Limits the lines per second: a library that floods stderr must not fill the disk or overload Logger. It must not
  # block on its writes either, so excess lines are read and counted.
  defp count(state) do
    now = second()

    if now == state.second,
      do: %{state | lines: state.lines + 1},
      else: %{tell_dropped(state) | second: now, lines: 1}
  end

  defp tell_dropped(state) do
    dropped = state.lines - @lines_per_second
    if dropped > 0, do: Logger.warning("#{state.prefix}(#{dropped} more lines were dropped)")
    state
  end

  @doc "As `printable/1`, for a text of several lines, which cannot be mistaken for separate log messages."
  @spec printable_lines(binary) :: String.t()
  def printable_lines(text),
    do: text |> String.split("\n") |> Enum.map_join("\n  | ", &printable/1)

  @doc """
  A line from outside, made safe to show: characters that move a terminal's cursor, change its colours, end the line or
  change the writing direction are escaped, and so is invalid UTF-8.

      iex> StarweaveImage.Sidecar.Log.printable("\\e[31mred\\tpear\\r\\n")
      "\\\\e[31mred\\tpear"
  """
  @spec printable(binary) :: String.t()
  def printable(text) do
    text = String.trim_trailing(text)

    if text =~ ~r/\A[\t\x20-\x7E]*\z/,
      do: text,
      else: text |> escaped([]) |> IO.iodata_to_binary()
  end

  defp escaped(<<char::utf8, rest::binary>>, done)
       when char == ?\t or char in 0x20..0x7E or
              (char > 0x9F and char not in 0x200E..0x200F and char not in 0x2028..0x202E and
                 char not in 0x2066..0x2069 and char not in [0x061C, 0xFEFF]),
       do: escaped(rest, [done, <<char::utf8>>])

  defp escaped(<<?\e, rest::binary>>, done), do: escaped(rest, [done, "\\e"])
  defp escaped(<<?\r, rest::binary>>, done), do: escaped(rest, [done, "\\r"])
  defp escaped(<<?\n, rest::binary>>, done), do: escaped(rest, [done, "\\n"])

  defp escaped(<<char::utf8, rest::binary>>, done),
    do: escaped(rest, [done, "\\u{#{Integer.to_string(char, 16)}}"])

  defp escaped(<<byte, rest::binary>>, done),
    do: escaped(rest, [done, "\\x", Base.encode16(<<byte>>)])

  defp escaped(<<>>, done), do: done

  defp second, do: System.monotonic_time(:second)
end
