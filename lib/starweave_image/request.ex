defmodule StarweaveImage.Request do
  @max_seed 0x7FFFFFFFFFFFFFFF
  @max_images 16
  # So that each image of the request has one that JavaScript, JSON and spreadsheets keep to the last digit.
  @drawn Integer.pow(2, 53) - @max_images
  @day 86_400_000
  # A bare name: to write it as a module would make this one depend on the whole API.
  @instance :"Elixir.StarweaveImage"

  @schema [
    model: {:model_id, nil, "The instance's `:default_model` unless given."},
    width:
      {{:multiple_of, 8, 64, 4096}, nil, "Pixels. The model's own default and limits apply."},
    height: {{:multiple_of, 8, 64, 4096}, nil, "Pixels, as `:width`."},
    steps: {{:integer, 1, 200}, nil, "Denoise steps. The model's own default and limits apply."},
    guidance_scale:
      {{:number, 0, 50}, nil,
       "How closely the prompt is followed. The model's own default and limits apply."},
    negative_prompt: {{:text, 0, 8192}, nil, "What the image should not show."},
    seed:
      {{:integer, -1, @max_seed}, nil,
       "-1 or nil draws a fresh one below 2^53; the image reports it. Image k of a request uses seed + k."},
    scheduler:
      {:scheduler, nil,
       "A sampler as other tools spell it (`DPM++ 2M Karras`, `euler_a`, `UniPC`) or a diffusers class (`EulerDiscreteScheduler`); the model's own unless given."},
    style: {{:text, 0, 256}, nil, "Added to the prompt after a comma."},
    image:
      {:image, nil,
       "Image to start from, as a file's bytes: up to 4096 pixels a side, of several pictures the first; turned upright, its colours as sRGB, what is transparent in it white."},
    strength:
      {{:number, 0, 1}, nil,
       "How far `:image` may be left, 1 being anywhere; 0.8 unless given. That share of the steps is made, at least one."},
    mask:
      {:image, nil,
       "Where `:image` may change (white) and where it stays (black, transparent), as a file's bytes, of the same size in pixels. Where all that is to be seen is black, the opaque may change."},
    variation_strength:
      {{:number, 0, 1}, nil,
       "How far image k goes from the picture of `:seed` towards that of `:variation_seed` + k, without `:image`: 0 is the one and 1 the other."},
    variation_seed:
      {{:integer, 0, @max_seed}, nil,
       "With `:variation_strength`; `:seed` unless given, so that image 0 is the picture of `:seed` itself."},
    num_images: {{:integer, 1, @max_images}, 1, "Images of one request, with consecutive seeds."},
    format: {{:one_of, [:png, :jpeg, :webp]}, :png, "File format of the image."},
    quality: {{:integer, 1, 100}, 90, "For JPEG and WebP."},
    metadata: {:boolean, true, "Whether the parameters are written into the file."},
    reproducible: {:boolean, false, "The same bytes for the same request, whatever else runs."},
    preview:
      {:boolean, false,
       "Small pictures of how the image forms, as `{:preview, preview}` events of `StarweaveImage.stream/2` and `StarweaveImage.subscribe/2`: at most ten an image."},
    id:
      {:id, nil,
       "Name of the request, drawn at random unless given. A second request with the id and the content of one that waits, runs or is done is that request, with other content it is refused; one that failed may be asked for again."},
    instance: {:atom, @instance, "Which of several running instances."},
    user_id:
      {{:text, 1, 128}, nil,
       "On whose behalf: users of a priority are served one by one, however many requests each has. It is in the telemetry events."},
    context:
      {{:list, {:text, 0, 8192}, 64}, [],
       "Accepted, and without effect yet: what was said before, oldest first."},
    priority:
      {{:one_of, [:interactive, :normal, :background]}, :normal,
       "Which goes first. A `:background` request that runs makes room at once for an `:interactive` one that finds none, and is begun anew later."},
    timeout:
      {{:integer, 1, @day}, 600_000,
       "Milliseconds until the request fails with `:timeout`, waiting and every attempt included."},
    queue_timeout:
      {{:integer, 1, @day}, nil,
       "Milliseconds until it fails with `:timeout` if it has not been sent to a sidecar by then; no limit but `:timeout` unless given."},
    run_timeout:
      {{:integer, 1, @day}, nil,
       "Milliseconds that one attempt may take, from the moment it is sent to a sidecar to its end, a model's load included; no limit but `:timeout` unless given."},
    fallback:
      {:boolean, false,
       "Whether another model of the `fallbacks` in the model's card may draw it when the model cannot be loaded; the image names the one that did, and says so in its notices."},
    durable:
      {:boolean, false,
       "Whether `StarweaveImage.submit/2` returns only when the request is on disk, so that it outlives the BEAM; needs the instance's `:journal`."}
  ]

  @moduledoc """
  One validated request for images.

  `StarweaveImage.generate/2` and its kin make it of the prompt and their options:

  #{StarweaveImage.Options.docs(@schema)}

  Anything else is an error that says what would be right:

      iex> {:error, error} = StarweaveImage.Request.new("a red apple", width: 250)
      iex> error.message
      "width must be a multiple of 8 from 64 to 4096, got 250"
      iex> {:error, error} = StarweaveImage.Request.new("a red apple", guidance: 7.5)
      iex> error.message
      "unknown option :guidance, did you mean :guidance_scale?"
  """

  alias StarweaveImage.{Error, Options}

  @enforce_keys [:id, :prompt, :seed]
  # `fresh_seed?`: the seed was drawn here and not asked for.
  defstruct [:prompt, :fresh_seed?, :content | Keyword.keys(@schema)]

  @type t :: %__MODULE__{
          id: String.t(),
          prompt: String.t(),
          negative_prompt: String.t() | nil,
          model: String.t() | nil,
          width: 64..4096 | nil,
          height: 64..4096 | nil,
          steps: 1..200 | nil,
          guidance_scale: float | nil,
          seed: non_neg_integer,
          variation_strength: float | nil,
          variation_seed: non_neg_integer | nil,
          num_images: 1..16,
          scheduler: String.t() | nil,
          style: String.t() | nil,
          image: binary | nil,
          mask: binary | nil,
          strength: float | nil,
          format: :png | :jpeg | :webp,
          quality: 1..100,
          metadata: boolean,
          reproducible: boolean,
          preview: boolean,
          instance: atom,
          user_id: String.t() | nil,
          context: [String.t()],
          priority: :interactive | :normal | :background,
          timeout: 1..86_400_000,
          queue_timeout: 1..86_400_000 | nil,
          run_timeout: 1..86_400_000 | nil,
          fallback: boolean,
          durable: boolean,
          fresh_seed?: boolean,
          content: binary
        }

  # What only the application knows of a request; the rest goes over the wire under the same names.
  @here [
    :instance,
    :user_id,
    :context,
    :priority,
    :timeout,
    :queue_timeout,
    :run_timeout,
    :fallback,
    :durable,
    :fresh_seed?,
    :content
  ]
  # What of the rest does not decide which picture it will be.
  @incidental [:id, :seed, :preview]
  @files [:image, :mask]
  @names Map.new(@schema, fn {name, _} -> {Atom.to_string(name), name} end)

  @doc false
  @spec options_docs() :: String.t()
  def options_docs, do: Options.docs(@schema)

  @doc """
  A request with its defaults, a seed and an id, so that a replay of it gives the same image.

      iex> {:ok, request} = StarweaveImage.Request.new("a red apple", steps: 20, seed: 7)
      iex> {request.steps, request.seed, request.format}
      {20, 7, :png}
  """
  @spec new(String.t(), keyword | map) :: {:ok, t} | {:error, Error.t()}
  def new(prompt, opts \\ []) do
    with {:ok, prompt} <- prompt(prompt),
         {:ok, values} <- Options.validate(opts, @schema),
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
      named = for {name, value} <- opts, do: {Map.get(@names, name, name), value}
      if Keyword.keyword?(named), do: named, else: Map.new(named)
    else
      opts
    end
  end

  @doc false
  # The `generate` message of the wire, all but its generation.
  @spec to_wire(t, pos_integer) :: map
  def to_wire(%__MODULE__{} = request, timeout_ms) do
    fields = request |> Map.from_struct() |> Map.drop(@here)

    for {name, value} <- fields,
        value != nil,
        into: %{t: :generate, timeout_ms: timeout_ms} do
      if name in @files, do: {name, {:bin, value}}, else: {name, value}
    end
  end

  @doc false
  # What `restore/2` makes the same request of, in another BEAM or in a later version of this library.
  @spec to_record(t) :: %{String.t() => term}
  def to_record(%__MODULE__{} = request) do
    fields = request |> Map.from_struct() |> Map.drop([:instance, :content, :fresh_seed?])

    for {name, value} <- fields, value != nil, into: %{"fresh_seed" => request.fresh_seed?} do
      if name in @files,
        do: {Atom.to_string(name), {:bin, value}},
        else: {Atom.to_string(name), value}
    end
  end

  @doc false
  @spec restore(%{String.t() => term}, instance :: atom) :: {:ok, t} | {:error, Error.t()}
  def restore(%{"prompt" => prompt} = record, instance) do
    opts =
      for name <- Keyword.keys(@schema),
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
    [request.prompt, request.negative_prompt, request.style, request.image, request.mask]
    |> Enum.reject(&is_nil/1)
    |> Enum.concat(request.context)
    |> IO.iodata_length()
  end

  defp prompt(prompt) do
    case Options.check(:prompt, :prompt, prompt) do
      {:ok, nil} -> {:error, :prompt, "prompt is required"}
      result -> result
    end
  end

  defp mask_has_image(%{mask: mask, image: nil}) when mask != nil,
    do: {:error, :mask, "mask needs image"}

  defp mask_has_image(_values), do: :ok

  defp variation(%{variation_strength: strength, image: image})
       when strength != nil and image != nil,
       do:
         {:error, :variation_strength,
          "variation_strength is for pictures from text alone; with image, strength says how far to go"}

  defp variation(%{variation_seed: seed, variation_strength: nil}) when seed != nil,
    do: {:error, :variation_seed, "variation_seed needs variation_strength"}

  defp variation(_values), do: :ok

  # A digest of what decides the picture, all but its seed.
  defp content(request) do
    decisive = Map.drop(Map.from_struct(request), (@here -- [:context]) ++ @incidental)
    :crypto.hash(:sha256, :erlang.term_to_binary(decisive, [:deterministic]))
  end

  defp fresh_seed,
    do: 8 |> :crypto.strong_rand_bytes() |> :binary.decode_unsigned() |> rem(@drawn)

  defp random_id, do: Base.encode16(:crypto.strong_rand_bytes(16), case: :lower)
end
