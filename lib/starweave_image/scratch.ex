defmodule StarweaveImage.Scratch do
  @moduledoc false
  # Short-lived folders in the folder for temporary files: private, and with a path short enough for a unix socket in
  # it.
  #
  # The process that makes one removes it. If it is killed before, the name tells whose folder it was, and the next
  # process that makes one removes it.

  @prefix "starweave_image-"
  # The path of a unix socket has room for 103 bytes on macOS and 107 on Linux; a folder's name takes some 50, and
  # names in it 20.
  @longest_parent 30
  # If the name does not tell whether the owner lives, the age of the folder decides.
  @old_s 86_400

  @doc "Makes a folder that no other user can enter, with a name that cannot be guessed."
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

  # A container may share the folder but not the process ids.
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

  # A zombie counts as dead.
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
