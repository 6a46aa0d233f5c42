defmodule StarweaveImage.Output do
  @moduledoc false

  # Writes an image to a file. priv/python/starweave_image/doors/output.py has the same rules;
  # tests/contract/outputs.jsonl tests both.
  #
  # A regular file is replaced as a whole, and keeps its mode and owner: a reader sees the old picture or the new one,
  # and on a full disk the old one stays. The target of a link is replaced, not the link. If a file cannot be
  # replaced, because nothing may be created in the folder or the owner would change, it is overwritten. Devices and
  # pipes are written to.

  import Bitwise

  @formats %{".png" => :png, ".jpg" => :jpeg, ".jpeg" => :jpeg, ".webp" => :webp}
  @links 40
  # Written as a trial, so that a full disk is noticed before anything is drawn.
  @probe 64 * 1024
  # Errors of a folder in which nothing can be created, though a file in it may be writable.
  @closed [:eacces, :eperm, :erofs]

  @doc """
  The format for a file's name, by its ending; PNG if it has none.

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
  The files for `count` images, and for a preview. If one of them cannot be written, the error says how `out` must be.

  This is called before anything is drawn, and opens no pipe, which would wait for a reader.
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

  # No files may be created beside a device or a pipe.
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

  @doc "Whether a file can be written, as far as that is known without writing it."
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
        # Appended: if the standard output is a file, its other content stays.
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

  # The owner before the mode: a change of the owner clears some bits of the mode.
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

  # A short name, which is allowed beside a name of 255 bytes, and one that cannot be guessed. The file must be new,
  # so that no prepared link is followed.
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
        # A link there stands for an open file, which may have no name any more.
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

  @doc "Whether the path leads to the standard output of this process."
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

  # From the last dot of the name on, unless that is its first character.
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
