defmodule StarweaveImage.Schema do
  @moduledoc false

  # A request: each field is here once, with its type and range, its default, its role and a sentence. From here
  # come the struct `StarweaveImage.Request` and its types, what the wire and the journal have of it, the lists in the
  # docs and the switches of `mix image.gen`. The Python side has the same fields (`schema.py`), since both refuse by
  # themselves; both are held to tests/contract/schema.json.

  alias StarweaveImage.{Options, Type}

  @max_seed 0x7FFFFFFFFFFFFFFF
  @day 86_400_000
  # A bare name: to write it as a module would make this one depend on the whole API.
  @instance :"Elixir.StarweaveImage"

  # Roles: the sidecar is told what decides the `:picture`, and what is `:sent` besides; all else is `:kept` here.
  @groups [
    {"What to draw",
     [
       negative_prompt: {{:text, 0, 8192}, nil, :picture, "What the picture should not show."},
       style: {{:text, 0, 256}, nil, :picture, "Added to the prompt after a comma."},
       model: {:model_id, nil, :picture, "The instance's `:default_model` unless given."},
       width:
         {{:multiple_of, 8, 64, 4096}, nil, :picture,
          "Pixels, within the model's limits. Unless given, the model's default."},
       height: {{:multiple_of, 8, 64, 4096}, nil, :picture, "Pixels, as `:width`."},
       effort:
         {{:one_of, [:draft, :standard, :high]}, :standard, :picture,
          "Sets the steps: the model's default number; half of it for `:draft`, 1.6 times for `:high`."},
       steps:
         {{:integer, 1, 200}, nil, :picture,
          "Denoise steps, within the model's limits; replaces `:effort`."},
       guidance_scale:
         {{:number, 0, 50}, nil, :picture,
          "How closely the prompt is followed. Unless given, the model's default."},
       scheduler:
         {:scheduler, nil, :picture,
          "The sampler, such as `DPM++ 2M Karras` or `euler_a`. Unless given, the model's own."},
       seed:
         {{:integer, -1, @max_seed}, nil, :sent,
          "The same seed gives the same picture. Without one, or with -1, it is random and reported."},
       num_images:
         {{:integer, 1, 16}, 1, :picture,
          "How many pictures, with the seeds `seed`, `seed` + 1, …"},
       variation_strength:
         {{:number, 0, 1}, nil, :picture,
          "How far each picture goes from that of `:seed` (0) to that of `:variation_seed` (1)."},
       variation_seed:
         {{:integer, 0, @max_seed}, nil, :picture,
          "The first picture's second seed; the next pictures have the next ones. Unless given, `:seed`."},
       reproducible:
         {:boolean, false, :picture, "The same bytes for the same request, whatever else runs."}
     ]},
    {"Starting from a picture",
     [
       image: {:image, nil, :picture, "The picture to start from."},
       images:
         {{:described, "a list of 1 to 4 PNG, JPEG or WebP files of at most 12 MiB each",
           {:some, :image, 4}}, nil, :picture,
          "In place of `:image`: several pictures, for a model that makes one picture of them."},
       mask:
         {:image, nil, :picture,
          "Where it may change (white) and where it stays (black, transparent). Same size as the picture."},
       strength:
         {{:number, 0, 1}, 0.8, :picture,
          "How much may change, from 0 (nothing) to 1 (everything)."},
       task:
         {{:one_of, [:text_to_image, :image_to_image, :edit, :inpaint]}, nil, :picture,
          "What to do, one of the tasks in the model's card. Unless given, it follows from the pictures."}
     ]},
    {"The file",
     [
       format: {{:one_of, [:png, :jpeg, :webp]}, :png, :picture, "The file format."},
       quality: {{:integer, 1, 100}, 90, :picture, "Of the encoding, for JPEG and WebP."},
       metadata: {:boolean, true, :picture, "Whether the parameters are written into the file."},
       preview:
         {:boolean, false, :sent, "Whether to send small pictures while each picture forms."}
     ]},
    {"Fairness and time",
     [
       priority:
         {{:one_of, [:interactive, :normal, :background]}, :normal, :kept,
          "Higher priorities go first."},
       user_id: {{:text, 1, 128}, nil, :kept, "The user: users of equal priority take turns."},
       timeout:
         {{:ms, 1, @day}, 600_000, :sent,
          "Milliseconds for all waiting and all attempts; then it fails with `:timeout`."},
       queue_timeout:
         {{:ms, 1, @day}, nil, :kept,
          "Milliseconds to wait for a sidecar; then it fails with `:timeout`. Unless given, no limit."},
       run_timeout:
         {{:ms, 1, @day}, nil, :kept,
          "Milliseconds for one attempt, with the load of its model. Unless given, no limit."},
       fallback:
         {:boolean, false, :kept,
          "Whether a model of the card's `fallbacks` may draw it if its own cannot be loaded."}
     ]},
    {"The request itself",
     [
       id:
         {:id, nil, :sent,
          "Its name; a second request of the same name and content joins it. Unless given, random."},
       durable:
         {:boolean, false, :kept,
          "Whether it is on disk when `submit/2` returns; needs the instance's `:journal`."},
       instance: {:atom, @instance, :kept, "Which of several running instances."},
       context:
         {{:list, {:text, 0, 8192}, 64}, [], :kept,
          "What was said before, oldest first. Accepted, without effect yet."}
     ]}
  ]

  @options Options.schema(@groups)
  @fields [{:prompt, :prompt} | for({name, {type, _, _}} <- @options, do: {name, type})]
  @deciding Options.with_role(@groups, :picture)
  @sent [{:prompt, :prompt, :prompt} | @deciding ++ Options.with_role(@groups, :sent)]
  # What was said before will decide it, too.
  @picture [:prompt, :context | Enum.map(@deciding, &elem(&1, 0))]
  @names Map.new(@fields, fn {name, _type} -> {Atom.to_string(name), name} end)

  @doc """
  The options of a request, in groups, with their roles.

      iex> [{"What to draw", fields} | _] = StarweaveImage.Schema.groups()
      iex> fields[:reproducible]
      {:boolean, false, :picture, "The same bytes for the same request, whatever else runs."}
  """
  @spec groups() :: Options.groups()
  def groups, do: @groups

  @doc """
  The same as one schema, for `StarweaveImage.Options.validate/2`.

      iex> StarweaveImage.Schema.options()[:quality]
      {{:integer, 1, 100}, 90, "Of the encoding, for JPEG and WebP."}
  """
  @spec options() :: Options.schema()
  def options, do: @options

  @doc """
  Every field of a request with its type: the prompt, which is no option, and the options.

      iex> hd(StarweaveImage.Schema.fields())
      {:prompt, :prompt}
  """
  @spec fields() :: [{atom, Type.t()}]
  def fields, do: @fields

  @doc """
  What the sidecar is told of a request: names, names on the wire, types.

      iex> List.keyfind(StarweaveImage.Schema.sent(), :timeout, 0)
      {:timeout, :timeout_ms, {:ms, 1, 86_400_000}}
  """
  @spec sent() :: [{name :: atom, wire_name :: atom, Type.t()}]
  def sent, do: @sent

  @doc """
  The names of what decides the picture, all but its seed.

      iex> :steps in StarweaveImage.Schema.picture() and :timeout not in StarweaveImage.Schema.picture()
      true
  """
  @spec picture() :: [atom]
  def picture, do: @picture

  @doc """
  The field of this name, or nil: nothing from outside becomes an atom.

      iex> {StarweaveImage.Schema.name("width"), StarweaveImage.Schema.name("wdth")}
      {:width, nil}
  """
  @spec name(String.t()) :: atom | nil
  def name(text), do: Map.get(@names, text)

  @doc """
  The fields of a request with their types, as the typespec of a struct has them.

      iex> StarweaveImage.Schema.specs()[:quality] |> Macro.to_string()
      "1..100"
  """
  @spec specs() :: [{atom, Macro.t()}]
  def specs do
    for {name, {type, default, _doc}} <- [{:prompt, {:prompt, "", ""}} | @options] do
      spec = Type.spec(type, :cast)
      {name, if(default == nil, do: Type.union([spec, nil]), else: spec)}
    end
  end
end
