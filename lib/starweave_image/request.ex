defmodule StarweaveImage.Request do
  alias StarweaveImage.{Error, Options, Schema}

  @moduledoc """
  One validated request for images.

  `StarweaveImage.generate/2` and similar functions make it from the prompt and these options:

  #{Options.docs(Schema.groups())}

  Anything else is an error that says what is allowed:

      iex> {:error, error} = StarweaveImage.Request.new("a red apple", width: 250)
      iex> error.message
      "width must be a multiple of 8 from 64 to 4096, got 250"
      iex> {:error, error} = StarweaveImage.Request.new("a red apple", guidance: 7.5)
      iex> error.message
      "unknown option :guidance, did you mean :guidance_scale?"

  ## Pictures to start from

  A picture is a file of at most 4096 pixels a side; if it holds several pictures, the first counts. It is turned
  upright and converted to sRGB, and transparent pixels become white. If all visible pixels of a mask are black, the
  opaque ones may change. `:strength` is the share of the steps that is made, at least one. Of several `:images` the
  first becomes the result.

  ## Seeds and variations

  Image k of a request uses `:seed` + k. A random seed is below 2^53, so that it stays exact in JavaScript. With
  `:variation_strength`, and without `:image`, image k goes that far from the picture of `:seed` towards that of
  `:variation_seed` + k. Without a `:variation_seed`, image 0 is the picture of `:seed` itself.

  A `:scheduler` has the name that other tools give it, or that of its diffusers class, such as
  `EulerDiscreteScheduler`.

  ## Previews

  They are `{:preview, preview}` events of `StarweaveImage.stream/2` and `StarweaveImage.subscribe/2`, at most ten an
  image.

  ## The same request

  A second request with the `:id` and the content of one that waits, runs or is done joins that request. With other
  content it is refused. A failed request may be submitted again.

  ## Which goes first

  Users of equal priority take turns, however many requests each has; `:user_id` is in the telemetry events. If an
  `:interactive` request finds no free slot, a running `:background` one makes room at once, and starts again later.
  A picture that a `:fallback` drew names its model, and says so in its notices.
  """

  {{:integer, 1, max_images}, _, _} = Schema.options()[:num_images]

  # So that each image of the request has one that JavaScript, JSON and spreadsheets keep to the last digit.
  @drawn Integer.pow(2, 53) - max_images

  # A frame has room for them and for what else is said.
  @max_pictures 24 * 1024 * 1024

  @enforce_keys [:id, :prompt, :seed]
  # `fresh_seed?`: the seed was drawn here and not asked for.
  defstruct [:prompt, :fresh_seed?, :content | Keyword.keys(Schema.options())]

  @own quote(
         do: [id: String.t(), seed: non_neg_integer(), fresh_seed?: boolean(), content: binary()]
       )

  @type t :: %__MODULE__{unquote_splicing(Keyword.merge(Schema.specs(), @own))}

  @typedoc "One option of a request."
  @type option :: unquote(Options.given_spec(Schema.options()))

  # Not written to the journal: whoever reads the record knows these already.
  @not_recorded [:instance]
  # What may be long.
  @long for {name, type} <- Schema.fields(),
            type in [:prompt, :image] or
              (is_tuple(type) and elem(type, 0) in [:text, :list, :described]),
            do: name

  @doc """
  A request with its defaults, a seed and an id, so that a replay of it gives the same image.

      iex> {:ok, request} = StarweaveImage.Request.new("a red apple", steps: 20, seed: 7)
      iex> {request.steps, request.seed, request.format}
      {20, 7, :png}
  """
  @spec new(String.t(), keyword | map) :: {:ok, t} | {:error, Error.t()}
  def new(prompt, opts \\ []) do
    with {:ok, prompt} <- prompt(prompt),
         {:ok, values} <- Options.validate(opts, Schema.options()),
         :ok <- images(values),
         :ok <- mask_has_image(values),
         :ok <- variation(values) do
      drawn = %{
        prompt: prompt,
        id: values.id || random_id(),
        seed: values.seed,
        fresh_seed?: values.seed in [nil, -1]
      }

      request = struct!(__MODULE__, Map.merge(values, drawn))
      request = if request.fresh_seed?, do: %{request | seed: fresh_seed()}, else: request
      {:ok, %{request | content: content(request)}}
    else
      {:error, field, message} ->
        {:error, Error.new(:invalid_request, message, %{field: field})}
    end
  end

  @doc false
  # Options from outside, such as the parameters of a page, by their names as atoms. What is unknown keeps its name, in a
  # map: `new/2` refuses it by that. What are no options at all stays as it is, for the same reason.
  @spec with_atoms(term) :: term
  def with_atoms(opts) when is_map(opts) and not is_struct(opts),
    do: opts |> Map.to_list() |> with_atoms()

  def with_atoms(opts) do
    if is_list(opts) and not List.improper?(opts) and Enum.all?(opts, &match?({_, _}, &1)) do
      named = for {name, value} <- opts, do: {named(name), value}
      if Keyword.keyword?(named), do: named, else: Map.new(named)
    else
      opts
    end
  end

  defp named(name) when is_binary(name), do: Schema.name(name) || name
  defp named(name), do: name

  @doc false
  # The `generate` message of the wire, all but its generation.
  @spec to_wire(t, pos_integer) :: map
  def to_wire(%__MODULE__{} = request, timeout_ms) do
    request = %{request | timeout: timeout_ms}

    for {name, wire_name, type} <- Schema.sent(),
        value <- [Map.fetch!(request, name)],
        value != nil,
        into: %{t: :generate},
        do: {wire_name, binary(type, value)}
  end

  defp binary(:image, value), do: {:bin, value}
  defp binary({:described, _words, type}, value), do: binary(type, value)
  defp binary({:some, :image, _max}, values), do: Enum.map(values, &{:bin, &1})
  defp binary(_type, value), do: value

  @doc false
  # What `restore/2` makes the same request of, in another BEAM or in a later version of this library.
  @spec to_record(t) :: %{String.t() => term}
  def to_record(%__MODULE__{} = request) do
    for {name, type} <- Schema.fields(),
        name not in @not_recorded,
        value <- [Map.fetch!(request, name)],
        value != nil,
        into: %{"fresh_seed" => request.fresh_seed?},
        do: {Atom.to_string(name), binary(type, value)}
  end

  @doc false
  @spec restore(%{String.t() => term}, instance :: atom) :: {:ok, t} | {:error, Error.t()}
  def restore(%{"prompt" => prompt} = record, instance) do
    opts =
      for name <- Keyword.keys(Schema.options()),
          {:ok, value} <- [Map.fetch(record, Atom.to_string(name))],
          do: {name, value}

    with {:ok, request} <- new(prompt, [instance: instance] ++ opts),
         do: {:ok, %{request | fresh_seed?: record["fresh_seed"] == true}}
  end

  @doc false
  # Whether both ask for the same, on behalf of the same user. A seed that was not asked for makes no difference.
  @spec same?(t, t) :: boolean
  def same?(one, other) do
    one.content == other.content and one.user_id == other.user_id and
      one.durable == other.durable and
      ((one.fresh_seed? and other.fresh_seed?) or one.seed == other.seed)
  end

  @doc false
  # What a request that waits holds, in bytes.
  @spec bytes(t) :: non_neg_integer
  def bytes(%__MODULE__{} = request) do
    @long |> Enum.map(&(Map.fetch!(request, &1) || "")) |> IO.iodata_length()
  end

  defp prompt(prompt) do
    case Options.check(:prompt, :prompt, prompt) do
      {:ok, nil} -> {:error, :prompt, "prompt is required"}
      result -> result
    end
  end

  defp images(%{images: images, image: image}) when images != nil and image != nil,
    do: {:error, :images, "images stands in place of image: only one of them may be given"}

  defp images(%{images: [_ | _] = images, mask: mask}) do
    if IO.iodata_length([mask || "" | images]) <= @max_pictures,
      do: :ok,
      else: {:error, :images, "images and mask must have at most 24 MiB together"}
  end

  defp images(_values), do: :ok

  defp mask_has_image(%{mask: mask, image: nil, images: nil}) when mask != nil,
    do: {:error, :mask, "mask needs image"}

  defp mask_has_image(_values), do: :ok

  defp variation(%{variation_strength: strength, image: image, images: images})
       when strength != nil and (image != nil or images != nil),
       do:
         {:error, :variation_strength,
          "variation_strength is for pictures from text alone; with image, strength says how far to go"}

  defp variation(%{variation_seed: seed, variation_strength: nil}) when seed != nil,
    do: {:error, :variation_seed, "variation_seed needs variation_strength"}

  defp variation(_values), do: :ok

  # A digest of what decides the picture, all but its seed.
  defp content(request) do
    decisive = Map.take(request, Schema.picture())
    :crypto.hash(:sha256, :erlang.term_to_binary(decisive, [:deterministic]))
  end

  defp fresh_seed,
    do: 8 |> :crypto.strong_rand_bytes() |> :binary.decode_unsigned() |> rem(@drawn)

  defp random_id, do: Base.encode16(:crypto.strong_rand_bytes(16), case: :lower)
end
