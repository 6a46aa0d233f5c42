defmodule StarweaveImage.SidecarLog do
  @moduledoc false
  # What a sidecar and everything it started write to fds 1 and 2, as lines in Logger. A unix socket,
  # since a port that uses fds 3 and 4 leaves 1 and 2 as they were: the terminal of the application.

  require Logger

  @lines_per_second 500
  @accept_ms 250
  @longest_line 65_536

  @doc "Listens; gives the path that the sidecar connects to. The path is gone once it has."
  @spec start_link(atom, non_neg_integer) :: {:ok, pid, Path.t()} | {:error, String.t()}
  def start_link(instance, index) do
    case :proc_lib.start_link(__MODULE__, :init, [instance, index]) do
      {:error, reason} ->
        {:error, "no socket for the log of Python can be made (#{inspect(reason)})"}

      {pid, path} ->
        {:ok, pid, path}
    end
  end

  @doc "Ends a reader that nobody connected to; one that reads goes on to the last line."
  @spec stop(pid) :: :ok
  def stop(reader) do
    send(reader, :stop)
    :ok
  end

  @doc false
  def init(instance, index) do
    # The end of the sidecar's owner must not cut off the last lines, nor leave the folder behind.
    Process.flag(:trap_exit, true)

    # Others on this machine must not write into our log.
    name = "starweave_image-#{Base.url_encode64(:crypto.strong_rand_bytes(9))}"
    folder = Path.join(System.tmp_dir() || "/tmp", name)
    # The path of a unix socket has room for some 100 bytes.
    folder = if byte_size(folder) > 90, do: Path.join("/tmp", name), else: folder
    path = Path.join(folder, "log")

    with :ok <- File.mkdir(folder),
         :ok <- File.chmod(folder, 0o700),
         {:ok, listener} <-
           :gen_tcp.listen(0, [
             :binary,
             ifaddr: {:local, path},
             packet: :line,
             buffer: @longest_line,
             active: false
           ]) do
      :proc_lib.init_ack({self(), path})
      accept(listener, folder, "image sidecar #{index} | ", instance)
    else
      {:error, reason} ->
        _ = File.rm_rf(folder)
        :proc_lib.init_ack({:error, reason})
    end
  end

  defp accept(listener, folder, prefix, instance) do
    case :gen_tcp.accept(listener, @accept_ms) do
      {:ok, socket} ->
        _ = File.rm_rf(folder)
        :ok = :gen_tcp.close(listener)
        Logger.metadata(instance: instance)
        read(socket, prefix, second(), 0)

      {:error, :timeout} ->
        receive do
          :stop -> File.rm_rf(folder)
          {:EXIT, _, _} -> File.rm_rf(folder)
        after
          0 -> accept(listener, folder, prefix, instance)
        end

      {:error, _closed} ->
        File.rm_rf(folder)
    end
  end

  # Bounded in lines a second: a library that floods stderr must cost neither the disk nor Logger, and
  # must not be blocked on its write either, so what is too much is read and counted.
  defp read(socket, prefix, second, count) do
    case :gen_tcp.recv(socket, 0) do
      {:ok, line} ->
        now = second()

        if now != second and count > @lines_per_second,
          do: Logger.warning("#{prefix}(#{count - @lines_per_second} more lines were dropped)")

        count = if now == second, do: count + 1, else: 1
        if count <= @lines_per_second, do: Logger.info([prefix, printable(line)])
        read(socket, prefix, now, count)

      {:error, _closed} ->
        if count > @lines_per_second,
          do: Logger.warning("#{prefix}(#{count - @lines_per_second} more lines were dropped)")

        :ok
    end
  end

  defp printable(line) do
    line = String.trim_trailing(line)
    if String.valid?(line), do: line, else: inspect(line)
  end

  defp second, do: System.monotonic_time(:second)
end
