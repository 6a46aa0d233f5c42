defmodule StarweaveImage.Scratch do
  @moduledoc false
  # Folders for moments, in the folder for temporary files: private, and with a path short enough for a unix socket in it.
  #
  # Whoever makes one removes it. If it is killed before it could, the name tells whose it was, and whoever makes the next
  # one removes it.

  @prefix "starweave_image-"
  # The path of a unix socket has room for 103 bytes on macOS and 107 on Linux; a folder's name takes some 50, and
  # names in it 20.
  @longest_parent 30
  # What cannot be told from the name is told by the age.
  @old_s 86_400

  @doc "Makes a folder that nobody else can enter or guess."
  @spec create() :: {:ok, Path.t()} | {:error, File.posix()}
  def create do
    parent = System.tmp_dir() || "/tmp"
    parent = if byte_size(parent) > @longest_parent, do: "/tmp", else: parent
    remove_left_behind(parent)
    random = Base.url_encode64(:crypto.strong_rand_bytes(9))
    folder = Path.join(parent, "#{@prefix}#{owner()}-#{random}")

    with :ok <- File.mkdir(folder),
         {:error, reason} <- File.chmod(folder, 0o700) do
      remove(folder)
      {:error, reason}
    else
      :ok -> {:ok, folder}
      error -> error
    end
  end

  @spec remove(Path.t()) :: :ok
  def remove(folder) do
    _ = File.rm_rf(folder)
    :ok
  end

  # Process ids mean nothing to a container that shares the folder and not the processes.
  defp owner, do: "#{namespace()}.#{System.pid()}"

  defp namespace do
    case File.read_link("/proc/self/ns/pid") do
      {:ok, link} -> String.replace(link, ~r/\D/, "")
      {:error, _} -> "0"
    end
  end

  defp remove_left_behind(parent) do
    with {:ok, names} <- File.ls(parent) do
      for @prefix <> rest <- names,
          folder = Path.join(parent, @prefix <> rest),
          [namespace, pid] <- [rest |> String.split("-") |> hd() |> String.split(".")],
          (namespace != "0" and namespace == namespace() and dead?(pid)) or old?(folder),
          do: remove(folder)
    end
  end

  # Also one whose end nobody has asked about yet.
  defp dead?(pid) do
    case File.read("/proc/#{pid}/stat") do
      {:ok, stat} -> stat =~ ~r/\) [ZX] /
      {:error, _} -> true
    end
  end

  defp old?(folder) do
    case File.lstat(folder, time: :posix) do
      {:ok, %{mtime: mtime}} -> System.os_time(:second) - mtime > @old_s
      {:error, _} -> false
    end
  end
end
