defmodule StarweaveImage.Output do
  @moduledoc false

  # Where an image goes. priv/python/starweave_image/output.py has the same rules, and tests/contract/outputs.jsonl
  # is what both are held to.
  #
  # A regular file is replaced as a whole, with its mode and owner: a reader sees the old picture or the new one, and
  # where there is no room the old one stays. Of a link that is so for the file that it leads to. Where that
  # cannot be, since nothing may be created in the folder or the owner would be another, the file is overwritten.
  # Anything else (a device, a pipe) is written into.

  import Bitwise

  @formats %{".png" => :png, ".jpg" => :jpeg, ".jpeg" => :jpeg, ".webp" => :webp}
  @links 40
  # What a full disk refuses before anything is drawn for it.
  @probe 64 * 1024
  # A folder in which nothing can be created, while a file in it may be writable.
  @closed [:eacces, :eperm, :erofs]

  @doc """
  The format that a name asks for; PNG where it has no ending.

      iex> StarweaveImage.Output.format("a/pear.JPG")
      {:ok, :jpeg}
      iex> StarweaveImage.Output.format("pear.gif")
      {:error, "must end in .png, .jpg, .jpeg or .webp, got .gif"}
  """
  @spec format(Path.t()) :: {:ok, :png | :jpeg | :webp} | {:error, String.t()}
  def format(out) do
    case out |> ending() |> String.downcase(:ascii) do
      "" -> {:ok, :png}
      ending when is_map_key(@formats, ending) -> {:ok, @formats[ending]}
      ending -> {:error, "must end in .png, .jpg, .jpeg or .webp, got #{ending}"}
    end
  end

  @doc """
  The files for so many images, and for a preview, if all of them can be written; else how `out` must be.

  It is asked before anything is drawn, so it opens no pipe: that would wait for a reader.
  """
  @spec plan(Path.t(), pos_integer, boolean) ::
          {:ok, %{paths: [Path.t()], preview: Path.t()}} | {:error, String.t()}
  def plan(out, count, preview?) do
    names = %{paths: numbered(out, count), preview: root(out) <> ".preview.jpg"}
    several? = count > 1 or preview?

    with :ok <- if(out == "-", do: {:error, "must name a file, not -"}, else: :ok),
         :ok <- if(several?, do: plain(out), else: :ok),
         paths = if(preview?, do: [names.preview | names.paths], else: names.paths),
         nil <- Enum.find_value(paths, &refusal/1) do
      {:ok, names}
    end
  end

  # Beside a device or a pipe nothing is to be created.
  defp plain(out) do
    case target(out) do
      {:into, _path} -> {:error, "must be a file for several images or a preview, got #{out}"}
      _file_or_error -> :ok
    end
  end

  defp refusal(path) do
    case check(path) do
      :ok ->
        nil

      {:error, reason} when reason in [:enoent, :enotdir] ->
        {:error, "must be in a folder that exists, got #{path}"}

      {:error, :eisdir} ->
        {:error, "must be a file, #{path} is a folder"}

      {:error, reason} ->
        {:error, "cannot be written, #{:file.format_error(reason)}: #{path}"}
    end
  end

  @doc "Whether a file can be written, as far as that can be known without writing it."
  @spec check(Path.t()) :: :ok | {:error, File.posix()}
  def check(path) do
    case target(path) do
      {:into, path} -> writable(File.stat(path))
      {:new, path} -> probe(path)
      {:replace, path, stat} -> with :ok <- writable({:ok, stat}), do: unless_closed(probe(path))
      error -> error
    end
  end

  defp writable({:ok, %{access: access}}) when access in [:write, :read_write], do: :ok
  defp writable({:ok, _stat}), do: {:error, :eacces}
  defp writable(error), do: error

  defp unless_closed({:error, reason}) when reason in @closed, do: :ok
  defp unless_closed(result), do: result

  defp probe(path) do
    with {:ok, part, file} <- create_beside(path) do
      result = :file.write(file, <<0::size(@probe)-unit(8)>>)
      _ = :file.close(file)
      _ = File.rm(part)
      result
    end
  end

  @doc "Writes a file; a pipe waits for its reader."
  @spec write(Path.t(), iodata) :: :ok | {:error, File.posix()}
  def write(path, data) do
    case target(path) do
      {:into, path} ->
        # Appending: what else the standard output got in a file stays.
        with {:ok, file} <- :file.open(path, [:append, :raw, :binary]),
             do: fill(file, data, false)

      {:new, path} ->
        replace(path, nil, data)

      {:replace, path, stat} ->
        with :ok <- writable({:ok, stat}),
             {:error, reason} when reason in @closed <- replace(path, stat, data),
             do: overwrite(path, data)

      error ->
        error
    end
  end

  defp replace(path, stat, data) do
    with {:ok, part, file} <- create_beside(path) do
      with :ok <- made_alike(part, stat),
           :ok <- fill(file, data, true),
           :ok <- File.rename(part, path) do
        :ok
      else
        error ->
          _ = :file.close(file)
          _ = File.rm(part)
          error
      end
    end
  end

  defp made_alike(_part, nil), do: :ok

  # The owner first: to change it takes some bits from the mode.
  defp made_alike(part, stat) do
    with {:ok, %{uid: uid, gid: gid}} <- File.stat(part),
         :ok <- if({uid, gid} == {stat.uid, stat.gid}, do: :ok, else: own(part, stat)),
         do: File.chmod(part, stat.mode &&& 0o7777)
  end

  defp own(part, stat) do
    with :ok <- File.chown(part, stat.uid), do: File.chgrp(part, stat.gid)
  end

  defp overwrite(path, data) do
    with {:ok, file} <- :file.open(path, [:read, :write, :raw, :binary]),
         {:ok, _} <- :file.position(file, IO.iodata_length(data)),
         :ok <- :file.truncate(file),
         {:ok, 0} <- :file.position(file, 0),
         do: fill(file, data, true)
  end

  defp fill(file, data, sync?) do
    result = :file.write(file, data)
    result = if result == :ok and sync?, do: :file.sync(file), else: result
    closed = :file.close(file)
    if result == :ok, do: closed, else: result
  end

  # A short name that nobody can guess, so that one of 255 bytes has room beside it; and a new file, so
  # that no link which waits there is followed.
  defp create_beside(path) do
    name = ".#{Base.url_encode64(:crypto.strong_rand_bytes(12))}.part"
    part = Path.join(Path.dirname(path), name)

    with {:ok, file} <- :file.open(part, [:write, :exclusive, :raw, :binary]),
         do: {:ok, part, file}
  end

  defp target(path, links \\ @links)
  defp target("", _links), do: {:error, :enoent}
  defp target(_path, 0), do: {:error, :eloop}

  defp target(path, links) do
    case File.lstat(path) do
      {:ok, %{type: :symlink}} ->
        # There a link is an open file, whose name may be gone, or none.
        if String.starts_with?(path, ["/proc/", "/dev/fd/"]) do
          {:into, path}
        else
          with {:ok, link} <- File.read_link(path),
               do: target(Path.join(Path.dirname(path), link) |> leading(link), links - 1)
        end

      {:ok, %{type: :regular} = stat} ->
        {:replace, path, stat}

      {:ok, %{type: :directory}} ->
        {:error, :eisdir}

      # Sockets cannot be opened.
      {:ok, %{mode: mode}} when (mode &&& 0o170000) == 0o140000 ->
        {:error, :enxio}

      {:ok, _device_or_pipe} ->
        {:into, path}

      {:error, :enoent} ->
        if String.ends_with?(path, "/"), do: {:error, :enoent}, else: {:new, path}

      error ->
        error
    end
  end

  defp leading(_joined, "/" <> _ = link), do: link
  defp leading(joined, _link), do: joined

  @doc "Whether what is written there goes where this process prints."
  @spec stdout?(Path.t()) :: boolean
  def stdout?(path) do
    with {:into, path} <- target(path),
         {:ok, one} <- File.stat(path),
         {:ok, other} <- File.stat("/dev/stdout") do
      {one.inode, one.major_device} == {other.inode, other.major_device}
    else
      _ -> false
    end
  end

  defp numbered(out, 1), do: [out]
  defp numbered(out, count), do: for(n <- 1..count, do: "#{root(out)}-#{n}#{ending(out)}")

  defp root(out), do: binary_part(out, 0, byte_size(out) - byte_size(ending(out)))

  # From the last dot of the name on, unless the name begins with it.
  defp ending(out) do
    name = out |> :binary.split("/", [:global]) |> List.last()

    case :binary.matches(name, ".") do
      [] -> ""
      dots -> name |> ending_at(elem(List.last(dots), 0))
    end
  end

  defp ending_at(_name, 0), do: ""
  defp ending_at(name, at), do: binary_part(name, at, byte_size(name) - at)
end
