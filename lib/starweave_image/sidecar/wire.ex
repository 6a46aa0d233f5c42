defmodule StarweaveImage.Sidecar.Wire do
  @moduledoc false
  # Frames and messages of docs/protocol.md, without I/O: bytes in, typed messages out.

  alias StarweaveImage.Msgpack

  @version 1
  @max_frame 33_554_432
  @max_part 4_194_304
  # A picture of 4096 pixels a side in PNG, and room for its text.
  @max_image 134_217_728

  # What the sidecar may say. A field is `{type, :required}` or has a default; keys not named here
  # are dropped, so that nothing from outside becomes an atom or reaches the rest of the code.
  @running [
    id: :str,
    phase: :str,
    step: :uint,
    steps: :uint,
    step_age_ms: :uint,
    step_ms: :uint,
    waits: {:maybe, :bool}
  ]
  @card [
    id: :str,
    name: :str,
    description: :str,
    aliases: {:list, :str},
    tasks: {:list, :str},
    pipeline: :str,
    source: :str,
    revision: {:maybe, :str},
    licence: :str,
    defaults:
      {:record,
       width: :uint,
       height: :uint,
       steps: :uint,
       guidance_scale: :number,
       scheduler: {:maybe, :str}},
    limits:
      {:record,
       min_size: :uint,
       max_size: :uint,
       multiple_of: :uint,
       max_steps: :uint,
       max_pixels: :uint,
       max_guidance: :number},
    memory_bytes: :uint,
    fallbacks: {:maybe, {:list, :str}},
    bytes: {:maybe, :uint},
    parked: {:maybe, :bool},
    idle_ms: {:maybe, :uint},
    load_ms: {:maybe, :uint},
    state: {:one_of, ~w(loaded loading available remote absent failed)a},
    error: {:maybe, :str}
  ]
  @heartbeat [
    seq: :uint,
    phase: {:one_of, ~w(starting loading ready busy draining)a},
    uptime_ms: :uint,
    capacity: :uint,
    grant: :uint,
    running: {:list, {:record, @running}},
    resident: {:list, :str},
    device_memory: {:maybe, {:record, used: :uint, total: :uint}},
    device_work: {:maybe, {:record, age_ms: :uint, usual_ms: :uint, known: :bool}},
    loads: {:maybe, {:list, {:record, model: :str, age_ms: :uint}}},
    rss: :uint,
    counters: {:record, accepted: :uint, done: :uint, failed: :uint, cancelled: :uint}
  ]
  @messages %{
    "ready" =>
      {:ready,
       v: :uint,
       pid: :uint,
       versions: :map,
       device: :str,
       dtype: :str,
       device_name: :str,
       capacity: :uint,
       default_model: :str,
       catalog: {:list, {:record, @card}}},
    "accepted" =>
      {:accepted,
       id: :str,
       model: :str,
       width: :uint,
       height: :uint,
       steps: :uint,
       guidance_scale: :number,
       scheduler: {:maybe, :str},
       seeds: {:list, :seed},
       format: {:one_of, ~w(png jpeg webp)a}},
    "progress" =>
      {:progress,
       id: :str,
       phase: {:one_of, ~w(loading denoising decoding encoding)a},
       image: :index,
       step: :uint,
       steps: :uint,
       elapsed_ms: :uint},
    "preview" =>
      {:preview,
       id: :str,
       image: :index,
       step: :uint,
       format: {:one_of, ~w(png jpeg webp)a},
       width: :uint,
       height: :uint,
       data: {:bytes, @max_part}},
    "image" =>
      {:image,
       id: :str,
       index: :index,
       seed: :seed,
       format: {:one_of, ~w(png jpeg webp)a},
       width: :uint,
       height: :uint,
       sha256: :sha256,
       size: {:int, 1, @max_image},
       offset: {:int, 0, @max_image - 1},
       data: {:bytes, @max_part}},
    "result" =>
      {:result,
       id: :str,
       index: :index,
       seed: :seed,
       kind: {:one_of, ~w(text vector video mesh)a},
       media_type: :media_type,
       facts: :map,
       sha256: :sha256,
       size: {:int, 1, @max_image},
       offset: {:int, 0, @max_image - 1},
       data: {:bytes, @max_part}},
    "done" =>
      {:done,
       id: :str,
       model: {:maybe, :str},
       parameters: {:maybe, :map},
       timings: {:maybe, :map},
       notices: {:maybe, {:list, :str}}},
    "error" =>
      {:error,
       id: {:maybe, :str},
       kind: :str,
       message: :str,
       field: {:maybe, :str},
       retryable: {:maybe, :bool},
       terminal: {:maybe, :bool}},
    "models" => {:models, id: :str, models: {:list, {:record, @card}}},
    "heartbeat" => {:heartbeat, @heartbeat},
    "log" =>
      {:log, level: {:one_of, ~w(debug info warning error)a}, message: :str, id: {:maybe, :str}}
  }

  @type buffer :: {[binary], held :: non_neg_integer, wanted :: non_neg_integer}
  @type message :: %{
          required(:t) => atom,
          required(:g) => non_neg_integer,
          optional(atom) => term
        }

  @spec version() :: pos_integer
  def version, do: @version

  @doc "A message as a frame, ready for the port: iodata, large binaries uncopied."
  @spec frame(map) :: iodata
  def frame(message) do
    body = Msgpack.encode!(message)
    size = IO.iodata_length(body)
    if size > @max_frame, do: raise(ArgumentError, "a frame of #{size} bytes is over the limit")
    [<<size::32>> | body]
  end

  @spec new() :: buffer
  def new, do: {[], 0, 0}

  @doc """
  Takes the bytes that came and gives the bodies of the frames that are whole now.

  A length of 0 or above 32 MiB is an error before anything of it is kept: framing is lost then.
  """
  @spec feed(buffer, binary) :: {:ok, [binary], buffer} | {:error, String.t()}
  # Chunks of a large frame are only joined when it is whole: joining at each would be quadratic.
  def feed({chunks, held, wanted}, bytes) when held + byte_size(bytes) < wanted,
    do: {:ok, [], {[bytes | chunks], held + byte_size(bytes), wanted}}

  def feed({chunks, _held, _wanted}, bytes),
    do: [bytes | chunks] |> Enum.reverse() |> IO.iodata_to_binary() |> cut([])

  defp cut(<<size::32, _::binary>>, _bodies) when size == 0 or size > @max_frame,
    do: {:error, "a frame of #{size} bytes"}

  defp cut(<<size::32, body::binary-size(size), rest::binary>>, bodies),
    do: cut(rest, [body | bodies])

  defp cut(<<>>, bodies), do: {:ok, Enum.reverse(bodies), new()}

  # The length of a frame as soon as it is there, else that of a length.
  defp cut(<<size::32, _::binary>> = rest, bodies),
    do: {:ok, Enum.reverse(bodies), {[rest], byte_size(rest), size + 4}}

  defp cut(rest, bodies), do: {:ok, Enum.reverse(bodies), {[rest], byte_size(rest), 4}}

  @doc "One frame's body as a message with atom keys, or why it is none. Unknown types are `:unknown`."
  @spec decode(binary) :: {:ok, message} | {:error, String.t()}
  def decode(body) do
    case Msgpack.decode(body) do
      {:ok, %{"t" => type} = map, ""} when is_binary(type) -> message(type, map)
      {:ok, %{}, ""} -> {:error, "a message without a type"}
      {:ok, _, ""} -> {:error, "a frame that is not a map"}
      {:ok, _, _rest} -> {:error, "bytes after the message"}
      {:error, :too_many} -> {:error, "a frame of too many values"}
      {:error, :too_deep} -> {:error, "a frame that nests too deep"}
      {:error, _} -> {:error, "a frame that is not msgpack"}
    end
  end

  defp message(type, map) do
    with {:ok, generation} <- value(:uint, Map.get(map, "g", 0)),
         {:ok, {name, fields}} <- Map.fetch(@messages, type),
         {:ok, record} <- value({:record, fields}, map) do
      {:ok, Map.merge(record, %{t: name, g: generation})}
    else
      :error -> {:ok, %{t: :unknown, g: 0, type: type}}
      {:error, field} -> {:error, "#{type}: field #{field} is missing or wrong"}
      :wrong -> {:error, "#{type}: field g is wrong"}
    end
  end

  defp value({:record, fields}, %{} = map) do
    Enum.reduce_while(fields, {:ok, %{}}, fn {name, type}, {:ok, record} ->
      case value(type, Map.get(map, Atom.to_string(name))) do
        {:ok, value} -> {:cont, {:ok, Map.put(record, name, value)}}
        {:error, field} -> {:halt, {:error, "#{name}.#{field}"}}
        :wrong -> {:halt, {:error, "#{name}"}}
      end
    end)
  end

  defp value({:maybe, _type}, nil), do: {:ok, nil}
  defp value({:maybe, type}, value), do: value(type, value)
  defp value(:uint, value) when is_integer(value) and value >= 0, do: {:ok, value}

  defp value({:int, low, high}, value)
       when is_integer(value) and value >= low and value <= high,
       do: {:ok, value}

  # Of an image among those of a request.
  defp value(:index, value), do: value({:int, 0, 15}, value)
  defp value(:seed, value), do: value({:int, 0, 0x7FFFFFFFFFFFFFFF}, value)

  defp value(:sha256, value) when is_binary(value) and byte_size(value) == 64,
    do: if(value =~ ~r/\A[0-9a-f]+\z/, do: {:ok, value}, else: :wrong)

  defp value(:media_type, value) when is_binary(value) and byte_size(value) <= 128,
    do: if(value =~ ~r"\A[a-z0-9.+-]+/[a-z0-9.+-]+\z", do: {:ok, value}, else: :wrong)

  defp value({:bytes, most}, value) when is_binary(value) and byte_size(value) in 1..most//1,
    do: {:ok, value}

  defp value(:number, value) when is_number(value), do: {:ok, value * 1.0}
  defp value(:str, value) when is_binary(value), do: {:ok, value}
  defp value(:bool, value) when is_boolean(value), do: {:ok, value}
  defp value(:map, %{} = value), do: {:ok, value}

  defp value({:one_of, atoms}, value) when is_binary(value) do
    case Enum.find(atoms, &(Atom.to_string(&1) == value)) do
      nil -> :wrong
      atom -> {:ok, atom}
    end
  end

  defp value({:list, type}, values) when is_list(values) do
    Enum.reduce_while(values, {:ok, []}, fn value, {:ok, list} ->
      case value(type, value) do
        {:ok, value} -> {:cont, {:ok, [value | list]}}
        wrong -> {:halt, wrong}
      end
    end)
    |> case do
      {:ok, list} -> {:ok, Enum.reverse(list)}
      wrong -> wrong
    end
  end

  defp value(_type, _value), do: :wrong
end
