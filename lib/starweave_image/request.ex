defmodule StarweaveImage.Request do
  @max_seed 0x7FFFFFFFFFFFFFFF

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
       "-1 or nil draws a fresh one; the image reports it. Image k of a request uses seed + k."},
    scheduler:
      {:scheduler, nil,
       "A diffusers class (`EulerDiscreteScheduler`) or short name (`euler`); the model's own unless given."},
    style: {{:text, 0, 256}, nil, "Added to the prompt after a comma."},
    image:
      {:image, nil,
       "Image to start from, as a file's bytes: up to 4096 pixels a side, turned upright, what is transparent in it white."},
    strength:
      {{:number, 0, 1}, nil,
       "How far `:image` may be left, 1 being anywhere; 0.8 unless given. That share of the steps is made, at least one."},
    mask:
      {:image, nil,
       "Where `:image` may change (white) and where it stays (black, transparent), as a file's bytes, of the same size in pixels."},
    variation_strength:
      {{:number, 0, 1}, nil,
       "How far image k goes from the picture of `:seed` towards that of `:variation_seed` + k, without `:image`: 0 is the one and 1 the other."},
    variation_seed:
      {{:integer, 0, @max_seed}, nil,
       "With `:variation_strength`; `:seed` unless given, so that image 0 is the picture of `:seed` itself."},
    num_images: {{:integer, 1, 16}, 1, "Images of one request, with consecutive seeds."},
    format: {{:one_of, [:png, :jpeg, :webp]}, :png, "File format of the image."},
    quality: {{:integer, 1, 100}, 90, "For JPEG and WebP."},
    metadata: {:boolean, true, "Whether the parameters are written into the file."},
    reproducible: {:boolean, false, "The same bytes for the same request, whatever else runs."},
    preview:
      {:boolean, false,
       "Small pictures of how the image forms, as `{:preview, preview}` events of `StarweaveImage.stream/2` and `StarweaveImage.subscribe/1`: at most ten an image."},
    id:
      {:id, nil,
       "Name of the request, drawn at random unless given. A second request with the id of one that waits, runs or is done is that request; one that failed may be asked for again."},
    instance: {:atom, StarweaveImage, "Which of several running instances."},
    user_id: {{:text, 1, 128}, nil, "On whose behalf; it is in the telemetry events."},
    context:
      {{:list, {:text, 0, 8192}, 64}, [],
       "Accepted, and without effect yet: what was said before, oldest first."},
    priority: {{:one_of, [:interactive, :normal, :background]}, :normal, "Which goes first."},
    timeout:
      {{:integer, 1, 86_400_000}, 600_000,
       "Milliseconds until the request fails with `:timeout`, waiting included."}
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
  defstruct [:prompt | Keyword.keys(@schema)]

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
          timeout: 1..86_400_000
        }

  # What only the application knows of a request; the rest goes over the wire under the same names.
  @here [:instance, :user_id, :context, :priority, :timeout]

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
      values = %{values | id: values.id || random_id(), seed: seed(values.seed)}
      {:ok, struct!(__MODULE__, Map.put(values, :prompt, prompt))}
    else
      {:error, field, message} ->
        {:error, Error.new(:invalid_request, message, %{field: field})}
    end
  end

  @doc false
  # The `generate` message of the wire, all but its generation.
  @spec to_wire(t, pos_integer) :: map
  def to_wire(%__MODULE__{} = request, timeout_ms) do
    fields = request |> Map.from_struct() |> Map.drop(@here)

    for {name, value} <- fields, value != nil, into: %{t: :generate, timeout_ms: timeout_ms} do
      if name in [:image, :mask], do: {name, {:bin, value}}, else: {name, value}
    end
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

  defp seed(seed) when seed in [nil, -1] do
    <<_sign::1, seed::63>> = :crypto.strong_rand_bytes(8)
    seed
  end

  defp seed(seed), do: seed

  defp random_id, do: Base.encode16(:crypto.strong_rand_bytes(16), case: :lower)
end
