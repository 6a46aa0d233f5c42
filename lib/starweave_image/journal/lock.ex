defmodule StarweaveImage.Journal.Lock do
  @moduledoc false

  # One user of a folder at a time, in one BEAM or several. Erlang has no file locks: the holder listens on a unix
  # socket in the folder, which the kernel closes with the process, however that ends, and a connect tells
  # at once whether anyone still listens.
  #
  # A process that wants the folder first listens under a new name, which is never used again, and then looks for
  # other listeners: of two at the same time at least the later one sees the other and withdraws. So a socket without
  # a listener may be removed by anyone, and two processes can never hold the folder at once.

  alias StarweaveImage.Scratch

  @connect_ms 1_000
  @tries 5

  @doc "Holds the folder until the calling process ends, for as long as what has this name is in it."
  @spec take(Path.t()) :: {:ok, name :: String.t()} | {:error, :held | File.posix()}
  def take(folder), do: take(folder, @tries)

  defp take(folder, tries) do
    case with_short_path(folder, &listen/1) do
      {:error, :held} when tries > 1 ->
        # A random pause, so that two that withdrew because of each other do not do so again.
        Process.sleep(:rand.uniform(20))
        take(folder, tries - 1)

      result ->
        result
    end
  end

  # The path of a unix socket has room for some 100 bytes, the folder's may be longer.
  defp with_short_path(folder, fun) when byte_size(folder) <= 80, do: fun.(folder)

  defp with_short_path(folder, fun) do
    with {:ok, scratch} <- Scratch.create() do
      link = Path.join(scratch, "j")

      try do
        with :ok <- File.ln_s(folder, link), do: fun.(link)
      after
        Scratch.remove(scratch)
      end
    end
  end

  defp listen(folder) do
    name = random()
    [new, lock] = for ending <- ~w(new lock), do: Path.join(folder, "#{name}.#{ending}")

    with {:ok, socket} <- :gen_tcp.listen(0, ifaddr: {:local, new}) do
      # The name ends in .lock only after it listens: such a name without a listener is dead for ever.
      with :ok <- File.rename(new, lock),
           {:ok, names} <- File.ls(folder),
           others = for(name <- names, do: Path.join(folder, name)) -- [lock],
           false <- Enum.any?(others, &(Path.extname(&1) == ".lock" and held?(&1))) do
        # Processes that were killed before they renamed their socket left these.
        for path <- others, Path.extname(path) == ".new", do: held?(path)
        {:ok, Path.basename(lock)}
      else
        refusal ->
          :gen_tcp.close(socket)
          for path <- [new, lock], do: File.rm(path)
          # Another process has removed the first name, so it holds the folder by now.
          if refusal in [true, {:error, :enoent}], do: {:error, :held}, else: refusal
      end
    end
  end

  defp held?(path) do
    case :gen_tcp.connect({:local, path}, 0, [active: false], @connect_ms) do
      {:error, :econnrefused} ->
        _ = File.rm(path)
        false

      {:error, :enoent} ->
        false

      {:ok, socket} ->
        :gen_tcp.close(socket)
        true

      {:error, _busy} ->
        true
    end
  end

  defp random, do: Base.url_encode64(:crypto.strong_rand_bytes(9))
end
