defmodule StarweaveImage.Sidecar.Wire do
  @moduledoc false
  # Frames and messages of docs/protocol.md, without I/O: bytes in, typed messages out.

  alias StarweaveImage.{Msgpack, Type}

  @version 1
  @max_frame 33_554_432
  @max_part 4_194_304
  # Enough for a PNG of 4096 × 4096 pixels and its text.
  @max_image 134_217_728

  # The index of an image within its request.
  @index {:integer, 0, 15}
  @seed {:integer, 0, 0x7FFFFFFFFFFFFFFF}
  # The most list items that fit in a frame.
  @many 131_072

  # The messages that a sidecar may send. Keys not listed here are dropped, so that nothing from outside becomes an atom
  # or reaches the rest of the code.
  @running [
    id: :text,
    phase: :text,
    step: :count,
    steps: :count,
    step_age_ms: :count,
    step_ms: :count,
    waits: {:maybe, :boolean}
  ]
  @card [
    id: :text,
    name: :text,
    description: :text,
    aliases: {:list, :text, @many},
    tasks: {:list, :text, @many},
    pipeline: :text,
    source: :text,
    revision: {:maybe, :text},
    licence: :text,
    defaults:
      {:record,
       width: :count,
       height: :count,
       steps: :count,
       guidance_scale: :float,
       scheduler: {:maybe, :text}},
    limits:
      {:record,
       min_size: :count,
       max_size: :count,
       multiple_of: :count,
       max_steps: :count,
       max_pixels: :count,
       max_guidance: :float},
    memory_bytes: :count,
    fallbacks: {:maybe, {:list, :text, @many}},
    bytes: {:maybe, :count},
    parked: {:maybe, :boolean},
    idle_ms: {:maybe, :count},
    load_ms: {:maybe, :count},
    state: {:one_of, ~w(loaded loading available remote absent failed)a},
    error: {:maybe, :text}
  ]
  @heartbeat [
    seq: :count,
    phase: {:one_of, ~w(starting loading ready busy draining)a},
    uptime_ms: :count,
    capacity: :count,
    grant: :count,
    running: {:list, {:record, @running}, @many},
    resident: {:list, :text, @many},
    device_memory: {:maybe, {:record, used: :count, total: :count}},
    device_work: {:maybe, {:record, age_ms: :count, usual_ms: :count, known: :boolean}},
    loads: {:maybe, {:list, {:record, model: :text, age_ms: :count}, @many}},
    rss: :count,
    counters: {:record, accepted: :count, done: :count, failed: :count, cancelled: :count}
  ]
  @messages %{
    "ready" =>
      {:ready,
       v: :count,
       pid: :count,
       versions: :map,
       device: :text,
       dtype: :text,
       device_name: :text,
       capacity: :count,
       default_model: :text,
       catalog: {:list, {:record, @card}, @many}},
    "accepted" =>
      {:accepted,
       id: :text,
       model: :text,
       width: :count,
       height: :count,
       steps: :count,
       guidance_scale: :float,
       scheduler: {:maybe, :text},
       seeds: {:list, @seed, @many},
       format: {:one_of, ~w(png jpeg webp)a}},
    "progress" =>
      {:progress,
       id: :text,
       phase: {:one_of, ~w(loading denoising decoding encoding)a},
       image: @index,
       step: :count,
       steps: :count,
       elapsed_ms: :count},
    "preview" =>
      {:preview,
       id: :text,
       image: @index,
       step: :count,
       format: {:one_of, ~w(png jpeg webp)a},
       width: :count,
       height: :count,
       data: {:data, 1, @max_part}},
    "image" =>
      {:image,
       id: :text,
       index: @index,
       seed: @seed,
       format: {:one_of, ~w(png jpeg webp)a},
       width: :count,
       height: :count,
       sha256: :sha256,
       size: {:integer, 1, @max_image},
       offset: {:integer, 0, @max_image - 1},
       data: {:data, 1, @max_part}},
    "result" =>
      {:result,
       id: :text,
       index: @index,
       seed: @seed,
       kind: {:one_of, ~w(text vector video mesh)a},
       media_type: :media_type,
       facts: :map,
       sha256: :sha256,
       size: {:integer, 1, @max_image},
       offset: {:integer, 0, @max_image - 1},
       data: {:data, 1, @max_part}},
    "done" =>
      {:done,
       id: :text,
       model: {:maybe, :text},
       parameters: {:maybe, :map},
       timings: {:maybe, :map},
       notices: {:maybe, {:list, :text, @many}}},
    "error" =>
      {:error,
       id: {:maybe, :text},
       kind: :text,
       message: :text,
       field: {:maybe, :text},
       retryable: {:maybe, :boolean},
       terminal: {:maybe, :boolean}},
    "models" => {:models, id: :text, models: {:list, {:record, @card}, @many}},
    "heartbeat" => {:heartbeat, @heartbeat},
    "log" =>
      {:log, level: {:one_of, ~w(debug info warning error)a}, message: :text, id: {:maybe, :text}}
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
  Takes received bytes and returns the bodies of the frames that are complete now.

  A length of 0 or above 32 MiB is an error, before any byte of that frame is kept: the framing is lost then.
  """
  @spec feed(buffer, binary) :: {:ok, [binary], buffer} | {:error, String.t()}
  # The chunks of a large frame are joined only when it is complete: joining at each chunk would be quadratic.
  def feed({chunks, held, wanted}, bytes) when held + byte_size(bytes) < wanted,
    do: {:ok, [], {[bytes | chunks], held + byte_size(bytes), wanted}}

  def feed({chunks, _held, _wanted}, bytes),
    do: [bytes | chunks] |> Enum.reverse() |> IO.iodata_to_binary() |> cut([])

  defp cut(<<size::32, _::binary>>, _bodies) when size == 0 or size > @max_frame,
    do: {:error, "a frame of #{size} bytes"}

  defp cut(<<size::32, body::binary-size(size), rest::binary>>, bodies),
    do: cut(rest, [body | bodies])

  defp cut(<<>>, bodies), do: {:ok, Enum.reverse(bodies), new()}

  # How many bytes are needed next: those of the frame if its length is known, else those of the length itself.
  defp cut(<<size::32, _::binary>> = rest, bodies),
    do: {:ok, Enum.reverse(bodies), {[rest], byte_size(rest), size + 4}}

  defp cut(rest, bodies), do: {:ok, Enum.reverse(bodies), {[rest], byte_size(rest), 4}}

  @doc "Decodes a frame's body to a message with atom keys, or says why it is invalid. Unknown types are `:unknown`."
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
    with {:ok, %{g: generation}} <- Type.cast({:record, g: {:maybe, :count}}, map),
         {:ok, {name, fields}} <- Map.fetch(@messages, type),
         {:ok, record} <- Type.cast({:record, fields}, map) do
      {:ok, Map.merge(record, %{t: name, g: generation || 0})}
    else
      :error -> {:ok, %{t: :unknown, g: 0, type: type}}
      {:error, field} -> {:error, "#{type}: field #{field} is missing or wrong"}
    end
  end
end
