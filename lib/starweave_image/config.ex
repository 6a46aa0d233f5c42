defmodule StarweaveImage.Config do
  @day 86_400_000
  @week 7 * @day
  @most_bytes 0x4000000000000
  # A bare name: to write it as a module would make this one depend on the whole API.
  @name :"Elixir.StarweaveImage"

  @model {:options,
          path: {:text, 1, 4096},
          revision: :revision,
          sha256: {:map, {:text, 1, 4096}, :sha256, 4096},
          fallbacks: {:list, :model_id, 256}}
  @models {:described,
           "a list of at most 1024 model ids and {id, path: …, revision: …, sha256: %{…}, fallbacks: […]}, " <>
             "revisions of A-Z a-z 0-9 . _ / - and sha256 of 64 digits 0-9 a-f by file name",
           {:list, {:either, [:model_id, {:tuple, [:model_id, @model]}]}, 1024}}
  @rate {:described, "{requests, milliseconds}",
         {:tuple, [{:integer, 1, 1_000_000_000}, {:integer, 1, @week}]}}

  # What sidecars may have of their own.
  @kind [
    device: {:device, "auto", :sent, "`auto` takes the best one of the machine."},
    dtype:
      {{:one_of, [:auto, :float32, :bfloat16, :float16]}, :auto, :sent,
       "`TORCH_DTYPE` in the environment wins."},
    capacity: {{:integer, 1, 64}, 8, :sent, "Requests that one process runs at once."},
    memory_budget:
      {{:bytes, 0, @most_bytes}, nil, :sent,
       "Bytes on the device for models. Unless given, 85 % of its memory."},
    ram_budget:
      {{:bytes, 0, @most_bytes}, 0, :sent,
       "Bytes of main memory for models that had to leave the device. No effect on a CPU."},
    offload:
      {{:one_of, [:auto, :none, :model, :sequential]}, :auto, :sent,
       "Keeps weights in main memory and moves networks or layers to the device; slower."},
    compile:
      {{:one_of, [:none, :blocks]}, :none, :sent,
       "`:blocks` compiles the denoiser: the first picture takes longer, others less."}
  ]
  @kind_type {:options, for({name, {type, _, _, _}} <- @kind, do: {name, {:maybe, type}})}
  @sidecars {:described,
             "an integer from 1 to 16, or a list of up to 16 option lists with " <>
               Enum.join(Keyword.keys(@kind), ", "),
             {:either, [{:integer, 1, 16}, {:some, @kind_type, 16}]}}

  @groups [
    {"The instance",
     [
       name: {:atom, @name, :kept, "Registered name, which callers give as `instance:`."},
       enabled: {:boolean, true, :kept, "false starts no Python; requests answer `:disabled`."},
       python:
         {{:text, 1, 4096}, nil, :kept,
          "Interpreter. Unless given, `STARWEAVE_IMAGE_PYTHON`, or the one of `mix image.setup`."},
       env:
         {{:described, "a list of names", {:list, {:text, 1, 4096}, 1024}}, [], :kept,
          "Further environment variables for Python, which otherwise sees those of an allow-list."}
     ]},
    {"Models",
     [
       models:
         {@models, [], :sent,
          "Models that may be loaded: ids of the hub, and folders by `:path`. Local copies always may."},
       default_model:
         {:model_id, "starweave/tiny", :sent, "The model for requests that name none."},
       preload:
         {{:list, :model_id, 256}, [], :sent, "Models to load at the start, one after the other."},
       pinned:
         {{:list, :model_id, 256}, [], :sent, "Models that stay in memory once they are loaded."},
       offline: {:boolean, false, :sent, "true never asks the hub."},
       disk_quota:
         {{:bytes, 0, @most_bytes}, nil, :sent,
          "Bytes for models in the hub's cache; the longest unused are deleted. Unless given, no bound."},
       max_models:
         {{:integer, 1, 10_000}, nil, :sent, "How many models the cache may hold, likewise."},
       cleanup_interval:
         {{:ms, 1000, @week}, 3_600_000, :sent, "ms between two checks of these bounds."}
     ]},
    {"Processes",
     [
       sidecars:
         {@sidecars, 1, :kept, "How many Python processes, or a list with the options of each."},
       standby:
         {{:integer, 0, 16}, 0, :kept,
          "Spare processes of each kind, which take over at once when one dies."}
     ] ++ Keyword.take(@kind, [:capacity, :device, :dtype])},
    {"Memory and speed",
     Keyword.take(@kind, [:memory_budget, :ram_budget, :offload]) ++
       [
         attention:
           {{:one_of, [:auto, :none, :sliced]}, :auto, :sent,
            "Whether a UNet computes its attention in slices. `:auto` does on small Macs."},
         vae:
           {{:one_of, [:auto, :none, :tiled]}, :auto, :sent,
            "Whether large pictures are decoded tile by tile. `:auto` does if memory requires it."}
       ] ++
       Keyword.take(@kind, [:compile]) ++
       [
         backend:
           {{:one_of, [:torch, :openvino]}, :torch, :sent,
            "`:openvino` computes UNets on a CPU; `mix image.setup --openvino` installs it."}
       ]},
    {"The queue",
     [
       max_queue:
         {{:integer, 1, 1_000_000}, 64, :kept, "Requests that may wait; more are `:overloaded`."},
       max_queue_bytes:
         {{:bytes, 0, 0x10000000000}, 268_435_456, :kept,
          "The same in bytes of input, for waiting and running requests."},
       rate_limit:
         {@rate, nil, :kept,
          "Requests accepted within a time, such as `{100, 60_000}`; more are `:rate_limited`."},
       user_rate_limit: {@rate, nil, :kept, "The same for each `:user_id`."},
       max_attempts:
         {{:integer, 1, 100}, 3, :kept,
          "At least this many deaths of the process, during a request alone, before it may be given up."},
       quarantine:
         {{:ms, 0, @day}, 600_000, :kept,
          "ms for which such a request is refused when it is submitted again."},
       max_retries:
         {{:integer, 0, 100}, 3, :kept,
          "Retries after a failure that may pass, with growing pauses."}
     ]},
    {"Results",
     [
       result_ttl: {{:ms, 0, @week}, 600_000, :kept, "ms that the result of `submit/2` is kept."},
       max_results: {{:integer, 1, 1_000_000}, 256, :kept, "How many such results are kept."},
       max_result_bytes:
         {{:bytes, 0, 0x10000000000}, 268_435_456, :kept,
          "Bytes of their images; the oldest are dropped."},
       journal:
         {{:text, 1, 4096}, nil, :kept,
          "Folder for durable requests, of this instance alone; made if missing."}
     ]},
    {"Time-outs and restarts",
     [
       start_timeout: {{:ms, 1, @day}, 120_000, :kept, "ms from start to `ready`."},
       heartbeat_interval: {{:ms, 50, 10_000}, 1_000, :sent, "ms between two heartbeats."},
       heartbeat_timeout:
         {{:ms, 1, @day}, 15_000, :kept,
          "ms without a heartbeat, once ready, until the process is killed."},
       stall_timeout:
         {{:ms, 1, @day}, 120_000, :kept,
          "ms without progress in new kinds of work, until the process is killed."},
       stall_floor:
         {{:ms, 1, @day}, 10_000, :kept,
          "The same for known kinds of work: ten times their usual time, and at least this many ms."},
       cancel_timeout:
         {{:ms, 1, @day}, 10_000, :kept,
          "ms that a cancelled request may go on, until the process is killed."},
       load_timeout:
         {{:ms, 1, @day}, 3_600_000, :kept, "ms for the load of a model, with its download."},
       shutdown_grace:
         {{:ms, 0, 600_000}, 2_000, :kept, "ms for running work when the instance stops."},
       backoff_min: {{:ms, 1, @day}, 500, :kept, "ms of pause after the first failed start."},
       backoff_max: {{:ms, 1, @day}, 30_000, :kept, "ms of the longest pause between starts."}
     ]}
  ]

  @moduledoc """
  The options of an instance, as `StarweaveImage.start_link/1` and a child specification take them.

  They may also be given as `config :starweave_image, StarweaveImage, …` under the instance's name.

  #{StarweaveImage.Options.docs(@groups)}

  ## Models

  A configured model is an id of the hub, which may be downloaded on first use, or `{id, options}`:

    * `:path` - a local folder in diffusers layout, its name in UTF-8
    * `:revision` - a branch, a tag or a commit
    * `:fallbacks` - ids of models that may take its place when it cannot be loaded, instead of those in the catalog
    * `:sha256` - pins weight files by their names within the model, such as
      `%{"unet/diffusion_pytorch_model.safetensors" => "…"}`

  A model that is loaded, `:pinned` or the `:default_model` is never deleted for `:disk_quota` or `:max_models`.

  ## Sidecars of different kinds

  `sidecars: [[device: "cuda:0"], [device: "cuda:1", capacity: 4]]` starts one process for each list. For options that a
  list does not have, those of the instance count.

  ## When a process is killed

  `:stall_timeout` is for work of unknown length: the first pass of each shape, and work outside of the device such as
  encoding. A slow device with a large model needs more. `:cancel_timeout` is for work that cannot be interrupted; the
  other requests of the process are done again. Time spent waiting for the device or for a model does not count.

  A request is given up with `:sidecar_crashed`, and refused for `:quarantine` under any id, only on evidence that it,
  and nothing else, ends the process.
  """

  alias StarweaveImage.{Options, Type}

  @schema Options.schema(@groups)
  @kind_schema Options.schema([{"", @kind}])
  @sent Options.with_role(@groups, :sent)

  @typedoc "One option of an instance."
  @type option :: unquote(Options.given_spec(@schema))

  @doc """
  The options of an instance, in groups, with their roles.

      iex> [{"The instance", fields} | _] = StarweaveImage.Config.groups()
      iex> fields[:enabled]
      {:boolean, true, :kept, "false starts no Python; requests answer `:disabled`."}
  """
  @spec groups() :: Options.groups()
  def groups, do: @groups

  @doc """
  The name of an instance with these options, which must be a keyword list.

      iex> StarweaveImage.Config.name(name: MyApp.Images)
      MyApp.Images
  """
  @spec name(keyword) :: atom
  def name(opts) do
    unless Keyword.keyword?(opts),
      do: raise(ArgumentError, "the options of an instance must be a keyword list")

    case Options.check(:name, :atom, opts[:name]) do
      {:ok, name} -> name || @name
      {:error, _field, message} -> raise ArgumentError, message
    end
  end

  @doc """
  Every option of an instance, given, configured or default. What is wrong is a mistake in the program, and raised.

      iex> StarweaveImage.Config.new(sidecars: 2)[:sidecars]
      2
      iex> StarweaveImage.Config.new(sidecars: 0)
      ** (ArgumentError) sidecars must be an integer from 1 to 16, or a list of up to 16 option lists with device, dtype, capacity, memory_budget, ram_budget, offload, compile, got 0
  """
  @spec new(keyword) :: keyword
  def new(opts) do
    configured = Application.get_env(:starweave_image, name(opts), [])

    unless Keyword.keyword?(configured) do
      raise ArgumentError,
            "config :starweave_image, #{inspect(name(opts))} must be a keyword list"
    end

    case Options.validate(Keyword.merge(configured, opts), @schema) do
      {:ok, config} -> Map.to_list(config)
      {:error, _field, message} -> raise ArgumentError, message
    end
  end

  @doc """
  What one sidecar has of its own, as given, checked.

      iex> StarweaveImage.Config.sidecar(device: "cuda:1", dtype: nil)
      {:ok, [device: "cuda:1"]}
      iex> StarweaveImage.Config.sidecar(capacity: 0)
      {:error, :capacity, "capacity must be an integer from 1 to 64, got 0"}
  """
  @spec sidecar(keyword | map) :: {:ok, keyword} | {:error, term, String.t()}
  def sidecar(options) do
    with {:ok, _values} <- Options.validate(options, @kind_schema),
         do: Type.cast(@kind_type, Enum.to_list(options))
  end

  @doc """
  The fields of `hello` that say how the sidecar is to work.

      iex> config = StarweaveImage.Config.new(models: [{"my/model", path: "/models/mine"}])
      iex> %{cleanup_interval_ms: 3_600_000} = wire = StarweaveImage.Config.to_wire(config)
      iex> wire.models
      [%{id: "my/model", path: "/models/mine"}]
  """
  @spec to_wire(keyword) :: %{atom => term}
  def to_wire(config) do
    for {name, wire_name, _type} <- @sent, value <- [config[name]], value != nil, into: %{} do
      {wire_name, if(name == :models, do: Enum.map(value, &entry/1), else: value)}
    end
  end

  defp entry({id, options}), do: options |> Map.new() |> Map.put(:id, id)
  defp entry(id), do: %{id: id}
end
