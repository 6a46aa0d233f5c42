defmodule StarweaveImage.Journal.Folder do
  @moduledoc false

  import Bitwise

  # The folder of a journal and the image files in it, each named by the SHA-256 of its content: blobs/ab/abcdef….
  # When one of these functions returns :ok, its work is durable, names included.

  @doc "Makes a folder, and those above it, for this user alone."
  @spec create(Path.t()) :: :ok | {:error, File.posix()}
  def create(folder) do
    parent = Path.dirname(folder)

    case File.mkdir(folder) do
      :ok ->
        with :ok <- File.chmod(folder, 0o700), do: sync(parent)

      {:error, :eexist} ->
        if File.dir?(folder), do: :ok, else: {:error, :enotdir}

      {:error, :enoent} when parent != folder ->
        with :ok <- create(parent), do: create(folder)

      error ->
        error
    end
  end

  @doc """
  Takes the access of other users to a folder and to a journal's files in it away; says whether they had any.

  It refuses a folder that is not the journal's own: another user's, or one that holds other things too.
  """
  @spec close(Path.t()) ::
          {:ok, was_open? :: boolean} | {:error, :not_ours | :shared | File.posix()}
  def close(folder) do
    with {:ok, %{mode: mode}} when (mode &&& 0o077) != 0 <- File.stat(folder),
         :ok <- ours(folder, mode),
         :ok <- closed(File.chmod(folder, 0o700)) do
      Enum.each(list(folder), &close_entry/1)
      {:ok, true}
    else
      {:ok, _closed} -> {:ok, false}
      error -> error
    end
  end

  defp ours(folder, mode) do
    journal? = File.regular?(Path.join(folder, "journal")) and (mode &&& 0o1000) == 0
    if journal? or list(folder) == [], do: :ok, else: {:error, :shared}
  end

  defp closed({:error, :eperm}), do: {:error, :not_ours}
  defp closed(result), do: result

  defp close_entry(path) do
    case File.lstat(path) do
      {:ok, %{type: :regular}} ->
        File.chmod(path, 0o600)

      {:ok, %{type: :directory}} ->
        _ = File.chmod(path, 0o700)
        Enum.each(list(path), &close_entry/1)

      _other ->
        :ok
    end
  end

  @doc "Creates a file for this user alone and opens it for writing; fails if anything, also a link, has the name."
  @spec create_file(Path.t()) :: {:ok, :file.fd()} | {:error, File.posix()}
  def create_file(path) do
    with {:ok, file} <- :file.open(path, [:write, :exclusive, :raw, :binary]),
         :ok <- File.chmod(path, 0o600),
         do: {:ok, file}
  end

  @doc "Makes the names in a folder durable: of files that were created, renamed or removed."
  @spec sync(Path.t()) :: :ok | {:error, File.posix()}
  def sync(folder) do
    case :file.open(folder, [:read, :raw, :directory]) do
      {:ok, file} ->
        result = :file.sync(file)
        :ok = :file.close(file)
        if refused?(result), do: :ok, else: result

      error ->
        if refused?(error), do: :ok, else: error
    end
  end

  # The errors of systems that cannot sync a folder.
  defp refused?(result),
    do: result in for(reason <- ~w(einval enotsup eisdir eacces)a, do: {:error, reason})

  @spec put_blob(Path.t(), binary) :: {:ok, sha256 :: String.t()} | {:error, File.posix()}
  def put_blob(folder, data) do
    blob = sha256(data)
    path = path(folder, blob)
    part = path <> ".part"

    # A process that was killed may have left one.
    _ = File.rm(part)

    # An existing file is replaced too: it may have been damaged since.
    with :ok <- create(Path.dirname(path)),
         {:ok, file} <- create_file(part),
         :ok <- fill(file, data),
         :ok <- File.rename(part, path),
         :ok <- sync(Path.dirname(path)) do
      {:ok, blob}
    else
      error ->
        _ = File.rm(part)
        error
    end
  end

  defp fill(file, data) do
    result = with :ok <- :file.write(file, data), do: :file.sync(file)
    closed = :file.close(file)
    if result == :ok, do: closed, else: result
  end

  @spec read_blob(Path.t(), String.t()) :: {:ok, binary} | :damaged | {:error, File.posix()}
  def read_blob(folder, blob) do
    path = path(folder, blob)

    # To read from a pipe or a device could block for ever.
    case with {:ok, %{type: :regular}} <- File.stat(path), do: File.read(path) do
      {:ok, %File.Stat{}} -> :damaged
      {:ok, data} -> if sha256(data) == blob, do: {:ok, data}, else: :damaged
      {:error, reason} when reason in [:enoent, :enotdir, :eisdir, :eio] -> :damaged
      error -> error
    end
  end

  @spec delete_blob(Path.t(), String.t()) :: :ok
  def delete_blob(folder, blob) do
    _ = File.rm(path(folder, blob))
    :ok
  end

  @doc """
  Deletes all image files but these, and incomplete ones.

  It also syncs the folder and the folders in it, which a killed process may not have done.
  """
  @spec sweep(Path.t(), [String.t()]) :: :ok | {:error, File.posix()}
  def sweep(folder, blobs) do
    kept = MapSet.new(blobs)

    for shelf <- list(Path.join(folder, "blobs")),
        file <- list(shelf),
        not MapSet.member?(kept, Path.basename(file)),
        do: File.rm(file)

    shelves = Path.join(folder, "blobs")

    with :ok <- sync(Path.dirname(folder)),
         :ok <- sync(folder),
         do: if(File.dir?(shelves), do: sync(shelves), else: :ok)
  end

  defp list(folder) do
    case File.ls(folder) do
      {:ok, names} -> Enum.map(names, &Path.join(folder, &1))
      {:error, _none} -> []
    end
  end

  defp path(folder, <<shelf::binary-size(2), _::binary>> = blob),
    do: Path.join([folder, "blobs", shelf, blob])

  defp sha256(data), do: :sha256 |> :crypto.hash(data) |> Base.encode16(case: :lower)
end
