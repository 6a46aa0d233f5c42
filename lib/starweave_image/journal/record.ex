defmodule StarweaveImage.Journal.Record do
  @moduledoc false

  # What the journal says of a request, as MessagePack:
  #
  #     {:accept, id, job}               it is to be done
  #     {:attempt, id, n}                it was begun for the n-th time
  #     {:finish, id, at, outcome}       it ended, at a wall clock time in ms, with
  #                                      {:ok, [{image without its data, SHA-256 of the data}]} or {:error, error}
  #     {:forget, id}                    nobody will ask for it again
  #
  # A map with text as keys, of which further ones are ignored: nothing from a disk becomes an atom but by
  # the lists below, and what is read are parts of the payload, which keep it alive.

  alias StarweaveImage.{Error, Image, Msgpack, Request}

  @type outcome :: {:ok, [{Image.t(), sha256 :: String.t()}]} | {:error, Error.t()}
  @type t ::
          {:accept, String.t(), map}
          | {:attempt, String.t(), pos_integer}
          | {:finish, String.t(), integer, outcome}
          | {:forget, String.t()}

  @formats ~w(png jpeg webp)a
  @timings ~w(queue load denoise decode encode total)a
  @details ~w(field retry_after_ms)a
  @images Map.keys(Image.__struct__()) -- [:__struct__, :data, :format, :timings]
  @blob ~r/\A[0-9a-f]{64}\z/

  @spec encode(t) :: {:ok, binary} | {:error, :unencodable}
  def encode(record) do
    case record |> fields() |> plain() |> Msgpack.encode() do
      {:ok, payload} -> {:ok, IO.iodata_to_binary(payload)}
      {:error, _reason} -> {:error, :unencodable}
    end
  end

  @spec decode(binary) :: {:ok, t} | :error
  def decode(payload) do
    with {:ok, %{"record" => name, "id" => id} = fields, ""} when is_binary(id) <-
           Msgpack.decode(payload),
         do: record(name, id, fields),
         else: (_ -> :error)
  end

  defp fields({:accept, id, job}), do: %{record: "accept", id: id, job: job}
  defp fields({:attempt, id, n}), do: %{record: "attempt", id: id, n: n}
  defp fields({:forget, id}), do: %{record: "forget", id: id}

  defp fields({:finish, id, at, {:ok, images}}) do
    images =
      for {image, blob} <- images do
        image |> Map.take([:format, :timings | @images]) |> Map.put(:blob, blob)
      end

    %{record: "finish", id: id, at: at, images: images}
  end

  defp fields({:finish, id, at, {:error, error}}),
    do: %{
      record: "finish",
      id: id,
      at: at,
      error: Map.delete(Map.from_struct(error), :__exception__)
    }

  # Text where it is text, bytes where not; both come back as binaries.
  defp plain(binary) when is_binary(binary),
    do: if(String.valid?(binary), do: binary, else: {:bin, binary})

  defp plain(list) when is_list(list),
    do: if(List.improper?(list), do: list, else: Enum.map(list, &plain/1))

  defp plain(%_{} = struct), do: struct

  defp plain(map) when is_map(map),
    do: Map.new(map, fn {key, item} -> {plain(key), plain(item)} end)

  defp plain(term), do: term

  defp record("accept", id, %{"job" => %{} = job}), do: {:ok, {:accept, id, job}}
  defp record("attempt", id, %{"n" => n}) when is_integer(n), do: {:ok, {:attempt, id, n}}
  defp record("forget", id, _fields), do: {:ok, {:forget, id}}

  defp record("finish", id, %{"at" => at, "images" => images})
       when is_integer(at) and is_list(images) do
    images = Enum.map(images, &image/1)
    if :error in images, do: :error, else: {:ok, {:finish, id, at, {:ok, images}}}
  end

  defp record("finish", id, %{"at" => at, "error" => error}) when is_integer(at) do
    with %{"kind" => kind, "message" => message, "details" => %{} = details} <- error,
         kind when kind != nil <- named(kind, Error.kinds(), nil),
         retryable? when is_boolean(retryable?) <- error["retryable?"] do
      details = Map.new(details, &detail/1)
      error = %Error{kind: kind, message: message, details: details, retryable?: retryable?}
      {:ok, {:finish, id, at, {:error, error}}}
    else
      _ -> :error
    end
  end

  defp record(_name, _id, _fields), do: :error

  defp image(%{"blob" => blob, "format" => format, "timings" => %{} = timings} = fields) do
    format = named(format, @formats, nil)

    if format && is_binary(blob) && blob =~ @blob do
      timings = Map.new(timings, fn {name, ms} -> {named(name, @timings, name), ms} end)
      fields = for name <- @images, into: %{}, do: {name, fields[Atom.to_string(name)]}
      {struct!(Image, Map.merge(fields, %{data: "", format: format, timings: timings})), blob}
    else
      :error
    end
  end

  defp image(_fields), do: :error

  defp detail({"field", value}), do: {:field, named(value, Map.keys(Request.__struct__()), value)}
  defp detail({name, value}), do: {named(name, @details, name), value}

  defp named(text, atoms, default), do: Enum.find(atoms, default, &(Atom.to_string(&1) == text))
end
