defmodule StarweaveImage.Journal.Record do
  @moduledoc false

  # The records of the journal, in MessagePack:
  #
  #     {:accept, id, job}               it is to be done; `job` has the request and when it was submitted
  #     {:attempt, id, n}                it was begun for the n-th time
  #     {:finish, id, at, outcome}       it ended, at a wall clock time in ms, with
  #                                      {:ok, [{result without its data, SHA-256 of the data}]} or {:error, error}
  #     {:forget, id}                    nobody will ask for it again
  #
  # Each is a map with text as keys; unknown keys are ignored. Text from a disk becomes an atom only by the lists below.
  # Binaries that are read are parts of the payload, which they keep alive.
  #
  # `cast/1` is the only way from a disk into this library, and what it accepts has a shape that other code may rely on.
  # A wrong value in a right shape (a width of 7) is refused by `Request.restore/2`.

  alias StarweaveImage.{Error, Image, Msgpack, Result, Schema, Text, Type}

  @version 1

  @type outcome :: {:ok, [{Result.any_kind(), sha256 :: String.t()}]} | {:error, Error.t()}
  @type t ::
          {:accept, String.t(), map}
          | {:attempt, String.t(), non_neg_integer}
          | {:finish, String.t(), integer, outcome}
          | {:forget, String.t()}
  @typedoc "A record that cannot be used: its kind and its id, as far as they can be read."
  @type rejected :: %{record: String.t() | nil, id: String.t() | nil, reason: String.t()}

  @kinds ~w(accept attempt finish forget)
  @formats ~w(png jpeg webp)a
  @timings ~w(queue load denoise decode encode total)a
  @details ~w(field retry_after_ms)a
  # More than any record has.
  @many 131_072
  @times {:map, :text, {:either, [:integer, :float]}, @many}
  @image [
    id: :text,
    index: :count,
    width: :count,
    height: :count,
    sha256: :text,
    model: {:maybe, :text},
    prompt: {:maybe, :text},
    negative_prompt: {:maybe, :text},
    seed: {:maybe, :count},
    steps: {:maybe, :count},
    guidance_scale: {:maybe, :float},
    scheduler: {:maybe, :text},
    parameters: :map,
    notices: {:list, :text, @many},
    attempts: :count
  ]

  # Of a result that is no picture: those of no kind in the log are pictures.
  @kinds_of_results ~w(text vector video mesh)a
  @other [
    id: :text,
    index: :count,
    sha256: :text,
    model: {:maybe, :text},
    prompt: {:maybe, :text},
    seed: {:maybe, :count},
    facts: :map,
    parameters: :map,
    notices: {:list, :text, @many},
    attempts: :count
  ]

  @spec encode(t) :: {:ok, binary} | {:error, :unencodable}
  def encode(record) do
    case record |> fields() |> Map.put(:v, @version) |> plain() |> Msgpack.encode() do
      {:ok, payload} -> {:ok, IO.iodata_to_binary(payload)}
      {:error, _reason} -> {:error, :unencodable}
    end
  end

  @doc """
  Reads any payload as a record.

  `:newer` is one of a later version of this library: not understood here and not ours to delete, nor are the image files
  that it may name.
  """
  @spec cast(binary) :: {:ok, t} | {:newer, blobs :: [String.t()]} | {:error, rejected}
  def cast(payload) do
    with {:ok, fields} <- map_of(payload),
         :ok <- known(fields),
         {:ok, record} <- record(Map.get(fields, "record"), fields) do
      {:ok, record}
    else
      {:newer, fields} -> {:newer, blobs(fields)}
      {:error, reason} -> {:error, %{record: nil, id: nil, reason: reason}}
      {:error, kind, id, reason} -> {:error, %{record: kind, id: id, reason: reason}}
    end
  end

  defp map_of(payload) do
    case Msgpack.decode(payload) do
      {:ok, %{} = fields, ""} when not is_struct(fields) -> {:ok, fields}
      {:ok, _other, _rest} -> {:error, "it is not one map"}
      {:error, _reason} -> {:error, "it is not MessagePack"}
    end
  end

  # A later version may give its records any shape under a higher number, or have further kinds.
  defp known(%{"v" => v} = fields) when is_integer(v) and v > @version, do: {:newer, fields}
  defp known(%{"v" => v}) when v != @version, do: {:error, "v must be a version"}
  defp known(%{"record" => kind}) when kind in @kinds, do: :ok
  defp known(%{"record" => kind} = fields) when is_binary(kind), do: {:newer, fields}
  defp known(_fields), do: {:error, "it does not say what it records"}

  # Everything in it that may be the name of an image file.
  defp blobs(text) when is_binary(text),
    do: if(match?({:ok, _}, Type.cast(:sha256, text)), do: [:binary.copy(text)], else: [])

  defp blobs(list) when is_list(list), do: Enum.flat_map(list, &blobs/1)
  defp blobs(%_{}), do: []

  defp blobs(map) when is_map(map),
    do: Enum.flat_map(map, fn {key, item} -> blobs(key) ++ blobs(item) end)

  defp blobs(_term), do: []

  defp fields({:accept, id, job}), do: %{record: "accept", id: id, job: job}
  defp fields({:attempt, id, n}), do: %{record: "attempt", id: id, n: n}
  defp fields({:forget, id}), do: %{record: "forget", id: id}

  defp fields({:finish, id, at, {:ok, images}}) do
    images = for {image, blob} <- images, do: image |> result() |> Map.put(:blob, blob)

    %{record: "finish", id: id, at: at, images: images}
  end

  defp fields({:finish, id, at, {:error, error}}),
    do: %{
      record: "finish",
      id: id,
      at: at,
      error: Map.delete(Map.from_struct(error), :__exception__)
    }

  defp result(%Image{} = image),
    do: Map.take(image, [:format, :timings | Keyword.keys(@image)])

  defp result(%Text{} = text),
    do: text |> Map.take([:timings | Keyword.keys(@other)]) |> Map.put(:kind, :text)

  defp result(%Result{} = result),
    do: Map.take(result, [:kind, :media_type, :timings | Keyword.keys(@other)])

  # Valid UTF-8 is written as text and everything else as bytes; both are read as binaries.
  defp plain(binary) when is_binary(binary),
    do: if(String.valid?(binary), do: binary, else: {:bin, binary})

  defp plain(list) when is_list(list),
    do: if(List.improper?(list), do: list, else: Enum.map(list, &plain/1))

  defp plain(%_{} = struct), do: struct

  defp plain(map) when is_map(map),
    do: Map.new(map, fn {key, item} -> {plain(key), plain(item)} end)

  defp plain(term), do: term

  ## The cast

  defp record(kind, fields) do
    with {:ok, id} <- id(fields),
         {:ok, record} <- record(kind, id, fields) do
      {:ok, record}
    else
      {:error, reason} -> {:error, kind, readable_id(fields), reason}
    end
  end

  defp id(%{"id" => id}) when id != nil do
    with :error <- Type.cast(:id, id), do: {:error, "id is no id"}
  end

  defp id(_fields), do: {:error, "id is missing"}

  defp readable_id(fields) do
    with {:ok, id} <- id(fields), do: :binary.copy(id), else: (_ -> nil)
  end

  # Without a recorded seed each start would draw a new one, and give another picture.
  defp record("accept", id, fields) do
    with {:ok, job} <- value(fields, :job, :map),
         {:ok, _ms} <- value(job, :submitted_at, :integer),
         {:ok, request} <- value(job, :request, :map),
         {:ok, _prompt} <- value(request, :prompt, :text),
         {:ok, _seed} <- value(request, :seed, :count),
         {:ok, ^id} <- value(request, :id, :text) do
      {:ok, {:accept, id, job}}
    else
      {:ok, _another} -> {:error, "the request in it has another id"}
      error -> error
    end
  end

  defp record("attempt", id, fields) do
    with {:ok, n} <- value(fields, :n, :count), do: {:ok, {:attempt, id, n}}
  end

  defp record("forget", id, _fields), do: {:ok, {:forget, id}}

  defp record("finish", id, fields) do
    with {:ok, at} <- value(fields, :at, :integer),
         {:ok, outcome} <- outcome(fields),
         do: {:ok, {:finish, id, at, outcome}}
  end

  defp outcome(%{"images" => [_ | _] = images}) do
    images
    |> Enum.reduce_while([], fn fields, images ->
      case result_of(fields) do
        {:ok, image} -> {:cont, [image | images]}
        error -> {:halt, error}
      end
    end)
    |> case do
      {:error, reason} -> {:error, "an image of it: " <> reason}
      images -> {:ok, {:ok, Enum.reverse(images)}}
    end
  end

  defp outcome(%{"error" => %{} = error}) do
    with {:ok, kind} <- value(error, :kind, {:one_of, Error.kinds()}),
         {:ok, message} <- value(error, :message, :text),
         {:ok, details} <- value(error, :details, :map),
         {:ok, _ms} <- value(details, :retry_after_ms, {:maybe, :integer}),
         {:ok, retryable?} <- value(error, :retryable?, :boolean) do
      details = Map.new(details, &detail/1)

      {:ok,
       {:error, %Error{kind: kind, message: message, details: details, retryable?: retryable?}}}
    end
  end

  defp outcome(_fields), do: {:error, "it has neither images nor an error"}

  defp result_of(%{} = fields) do
    with {:ok, blob} <- value(fields, :blob, :sha256),
         {:ok, kind, own} <- own(fields),
         {:ok, timings} <- value(fields, :timings, @times),
         %{} = values <- values(fields, if(kind == Image, do: @image, else: @other)) do
      timings = Map.new(timings, fn {name, ms} -> {named(name, @timings, name), ms} end)
      {:ok, {struct!(kind, values |> Map.merge(own) |> Map.put(:timings, timings)), blob}}
    end
  end

  defp result_of(_fields), do: {:error, "it is not a map"}

  # The struct that it becomes, and what that alone has.
  defp own(%{"kind" => _} = fields) do
    with {:ok, kind} <- value(fields, :kind, {:one_of, @kinds_of_results}),
         {:ok, media_type} <- value(fields, :media_type, {:maybe, :text}) do
      case {kind, media_type} do
        {:text, _} -> {:ok, Text, %{text: ""}}
        {_, nil} -> {:error, "media_type is missing"}
        _ -> {:ok, Result, %{data: "", kind: kind, media_type: media_type}}
      end
    end
  end

  defp own(fields) do
    with {:ok, format} <- value(fields, :format, {:one_of, @formats}),
         do: {:ok, Image, %{data: "", format: format}}
  end

  defp values(fields, types) do
    Enum.reduce_while(types, %{}, fn {name, type}, values ->
      case value(fields, name, type) do
        {:ok, value} -> {:cont, Map.put(values, name, value)}
        error -> {:halt, error}
      end
    end)
  end

  defp value(fields, name, type) do
    value = Map.get(fields, Atom.to_string(name))

    case Type.cast(type, value) do
      {:ok, value} -> {:ok, value}
      _wrong when value == nil -> {:error, "#{name} is missing"}
      _wrong -> {:error, "#{name} has a wrong type or is out of range"}
    end
  end

  defp detail({"field", value}), do: {:field, (is_binary(value) && Schema.name(value)) || value}
  defp detail({name, value}), do: {named(name, @details, name), value}

  defp named(text, atoms, default), do: Enum.find(atoms, default, &(Atom.to_string(&1) == text))
end
