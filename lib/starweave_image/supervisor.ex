defmodule StarweaveImage.Supervisor do
  @moduledoc false
  # One running instance:
  #
  #     StarweaveImage.Keeper, which the host's supervisor sees
  #     └── StarweaveImage.Supervisor (rest_for_one)
  #         ├── StarweaveImage.Journal, where there is one
  #         ├── StarweaveImage.Queue, registered as the instance's name
  #         └── sidecar supervisor (one_for_one)
  #             └── StarweaveImage.Keeper × sidecars
  #                 └── StarweaveImage.Sidecar ── log reader ═ port ═ Python
  #
  # Keepers wait between restarts and never give up; supervisors restart at once, and give up only where that does not help.
  #
  # The queue comes before the sidecars and outlives them: it owns what must survive. If it dies itself, nobody
  # knows what the sidecars work on, so they are started anew behind it, and what is durable is read from the journal.

  use Supervisor

  # Whoever kills our processes by hand, or a script, stays below it; what cannot work goes over it at once.
  @restarts [max_restarts: 50, max_seconds: 5]

  alias StarweaveImage.{Journal, Keeper, Options, Queue, Sidecar}

  @doc false
  def models(models) when is_list(models) do
    if Enum.all?(models, &model?/1), do: {:ok, models}, else: :error
  end

  def models(_models), do: :error

  defp model?({id, options}) when is_list(options) do
    model?(id) and Keyword.keyword?(options) and Enum.all?(options, &model_option?/1)
  end

  defp model?(id) when is_binary(id), do: match?({:ok, _}, Options.check(:model, :model_id, id))
  defp model?(_model), do: false

  # As the sidecar takes them, which would refuse the whole configuration for one of them.
  defp model_option?({:path, path}),
    do: match?({:ok, path} when path != nil, Options.check(:path, {:text, 1, 4096}, path))

  defp model_option?({:revision, revision}),
    do: is_binary(revision) and revision =~ ~r/\A[A-Za-z0-9._\/-]{1,256}\z/

  defp model_option?({:fallbacks, ids}), do: match?({:ok, _}, model_ids(ids))

  defp model_option?({:sha256, %{} = pins}) do
    map_size(pins) <= 4096 and
      Enum.all?(pins, fn {file, sha256} ->
        is_binary(file) and String.valid?(file) and is_binary(sha256) and
          sha256 =~ ~r/\A[0-9a-f]{64}\z/
      end)
  end

  defp model_option?(_option), do: false

  @doc false
  def device(name) when is_binary(name),
    do: if(name =~ ~r/\A(auto|cpu|cuda(:\d+)?|mps|xpu)\z/, do: {:ok, name}, else: :error)

  def device(_name), do: :error

  @doc false
  def model_ids(ids) when is_list(ids) do
    if length(ids) <= 256 and
         Enum.all?(ids, &match?({:ok, id} when id != nil, Options.check(:id, :model_id, &1))),
       do: {:ok, ids},
       else: :error
  end

  def model_ids(_ids), do: :error

  @doc false
  def names(names) when is_list(names),
    do: if(Enum.all?(names, &is_binary/1), do: {:ok, names}, else: :error)

  def names(_names), do: :error

  @doc false
  def rate({requests, ms})
      when is_integer(requests) and requests in 1..1_000_000_000 and is_integer(ms) and
             ms in 1..604_800_000,
      do: {:ok, {requests, ms}}

  def rate(_rate), do: :error

  @sidecar_options ~w(device dtype capacity memory_budget ram_budget offload compile)a

  @doc false
  def sidecars(count) when is_integer(count) and count in 1..16, do: {:ok, count}

  def sidecars([_ | _] = kinds) when length(kinds) <= 16 do
    if Enum.all?(kinds, &match?({:ok, _}, sidecar(&1))), do: {:ok, kinds}, else: :error
  end

  def sidecars(_sidecars), do: :error

  @doc false
  # What one sidecar has of its own, as given, checked.
  @spec sidecar(term) :: {:ok, keyword} | {:error, term, String.t()}
  def sidecar(options) do
    with {:ok, values} <- Options.validate(options, Keyword.take(schema(), @sidecar_options)),
         do: {:ok, for({name, _} <- options, do: {name, values[name]})}
  end

  @day 86_400_000
  @week 7 * @day
  # A bare name: to write it as a module would make this one depend on the whole API.
  @name :"Elixir.StarweaveImage"
  @schema [
    name: {:atom, @name, "Registered name; callers choose an instance by `:instance`."},
    enabled: {:boolean, true, "false starts no Python; requests answer `:disabled`."},
    models:
      {{:custom,
        "a list of model ids and {id, path: …, revision: …, sha256: %{…}, fallbacks: […]}, paths in UTF-8, revisions of A-Z a-z 0-9 . _ / - and sha256 of 64 digits 0-9 a-f by file name",
        &__MODULE__.models/1}, [],
       "What may be loaded beside the catalog's local copies: a hub id may be downloaded on first use, a `:path` is a local folder in diffusers layout. `:fallbacks` are ids of models that may take its place when it cannot be loaded, instead of those in the catalog. `:sha256` pins weight files by their names within the model, such as `%{\"unet/diffusion_pytorch_model.safetensors\" => \"…\"}`."},
    default_model: {:model_id, "starweave/tiny", "Used when a request names none."},
    sidecars:
      {{:custom,
        "an integer from 1 to 16, or a list of up to 16 option lists with device, dtype, capacity, memory_budget, ram_budget, offload, compile",
        &__MODULE__.sidecars/1}, 1,
       "Python processes: so many alike, or one for each list, whose options go before those of the instance, such as `[[device: \"cuda:0\"], [device: \"cuda:1\"]]`."},
    standby:
      {{:integer, 0, 16}, 0,
       "Spare processes for each kind of sidecar, with everything imported and nothing loaded: one takes over at once when a sidecar dies."},
    capacity: {{:integer, 1, 64}, 8, "Requests that one of them runs at once."},
    python:
      {{:text, 1, 4096}, nil,
       "Interpreter to run; else `STARWEAVE_IMAGE_PYTHON`, else what `mix image.setup` made."},
    device:
      {{:custom, "auto, cpu, cuda, cuda:N, mps or xpu", &__MODULE__.device/1}, "auto",
       "`auto` takes the best that is there."},
    dtype:
      {{:one_of, [:auto, :float32, :bfloat16, :float16]}, :auto,
       "`TORCH_DTYPE` in the environment wins."},
    preload:
      {{:custom, "a list of model ids", &__MODULE__.model_ids/1}, [],
       "Models to load at the start, one after the other; the first request need not wait for them."},
    pinned:
      {{:custom, "a list of model ids", &__MODULE__.model_ids/1}, [],
       "Models that stay in memory once they are loaded."},
    memory_budget:
      {{:integer, 0, 1_125_899_906_842_624}, nil,
       "Bytes of device memory for models; by default 85 % of it. The longest unused make room for the next."},
    ram_budget:
      {{:integer, 0, 1_125_899_906_842_624}, 0,
       "Bytes of main memory for models that had to leave the device: from there they are back in a fraction of a load. Without effect on a CPU."},
    disk_quota:
      {{:integer, 0, 1_125_899_906_842_624}, nil,
       "Bytes that models may take in the cache of the hub: before a download and from time to time the longest unused are deleted, never one that is in use, `:pinned` or the `:default_model`. No bound unless given."},
    max_models: {{:integer, 1, 10_000}, nil, "How many models may be there, likewise."},
    cleanup_interval: {{:integer, 1000, @week}, 3_600_000, "ms between two such looks."},
    offload:
      {{:one_of, [:auto, :none, :model, :sequential]}, :auto,
       "Whether a model's weights wait in main memory and visit the device by network or by layer: slower, for models that do not fit. `:auto` looks at what is free."},
    attention:
      {{:one_of, [:auto, :none, :sliced]}, :auto,
       "Whether a UNet computes its attention in slices, to save memory. `:auto` does on small Macs."},
    vae:
      {{:one_of, [:auto, :none, :tiled]}, :auto,
       "Whether large pictures are decoded tile by tile. `:auto` does where the model's largest would not fit on the device."},
    compile:
      {{:one_of, [:none, :blocks]}, :none,
       "`:blocks` compiles the blocks that a denoiser repeats: the first picture takes longer, the others less. Needs a C++ compiler on a CPU."},
    backend:
      {{:one_of, [:torch, :openvino]}, :torch,
       "`:openvino` computes the UNet of a model through OpenVINO, on a CPU; `mix image.setup --openvino` installs it."},
    offline: {:boolean, false, "true never asks the hub."},
    env:
      {{:custom, "a list of names", &__MODULE__.names/1}, [],
       "Further environment variables that Python may see; by default it sees an allow-list."},
    max_queue: {{:integer, 1, 1_000_000}, 64, "Requests that may wait; more are `:overloaded`."},
    max_queue_bytes:
      {{:integer, 0, 1_099_511_627_776}, 268_435_456,
       "The same in bytes of input, of what runs and what waits."},
    rate_limit:
      {{:custom, "{requests, milliseconds}", &__MODULE__.rate/1}, nil,
       "How many requests are taken in within a time, such as `{100, 60_000}`; more are `:rate_limited`. As many may come at once. No limit unless given."},
    user_rate_limit:
      {{:custom, "{requests, milliseconds}", &__MODULE__.rate/1}, nil,
       "The same for each `:user_id`."},
    max_attempts:
      {{:integer, 1, 100}, 3,
       "Deaths of the Python process under a request that runs alone before it may be given up for them, at least; it is only on evidence that it, and nothing else, ends the process."},
    quarantine:
      {{:integer, 0, @day}, 600_000,
       "ms for which a request that was given up so is refused when it comes again, under any id, and under any seed unless it was drawn with another."},
    max_retries:
      {{:integer, 0, 100}, 3,
       "Times that a request is tried again after a failure that may pass (a broken download, memory that others hold), with growing pauses."},
    result_ttl: {{:integer, 0, @week}, 600_000, "ms that the result of `submit/2` is kept."},
    max_results: {{:integer, 1, 1_000_000}, 256, "How many such results are kept."},
    max_result_bytes:
      {{:integer, 0, 1_099_511_627_776}, 268_435_456,
       "How many bytes of images they may be; the oldest go."},
    journal:
      {{:text, 1, 4096}, nil,
       "Folder for what is submitted with `durable: true`, and its results; made if need be. One instance at a time may use it."},
    start_timeout: {{:integer, 1, @day}, 120_000, "ms from start to `ready`."},
    heartbeat_interval: {{:integer, 50, 10_000}, 1_000, "ms."},
    heartbeat_timeout:
      {{:integer, 1, @day}, 15_000,
       "ms without a heartbeat until it is killed; before `ready` only `start_timeout` counts."},
    stall_timeout:
      {{:integer, 1, @day}, 120_000,
       "ms without progress until it is killed, in work of which nothing tells how long it takes: the first pass of each kind, and what is outside of the device, such as encoding. A slow device with a large model needs more."},
    stall_floor:
      {{:integer, 1, @day}, 10_000,
       "The same for passes of a kind that was seen before, and for a picture's further steps: ten times what they took, and at least so many ms."},
    cancel_timeout:
      {{:integer, 1, @day}, 10_000,
       "ms that a request may go on after it was cancelled or its time was over, in work that cannot be broken off, such as encoding; then the process is killed, and its other requests are done again. Waiting for the device or a model does not count."},
    load_timeout:
      {{:integer, 1, @day}, 3_600_000,
       "ms that loading a model may take, its download included, until the process is killed."},
    shutdown_grace:
      {{:integer, 0, 600_000}, 2_000, "ms for running work when the instance stops."},
    backoff_min: {{:integer, 1, @day}, 500, "ms before the second start in a row that fails."},
    backoff_max: {{:integer, 1, @day}, 30_000, "ms, the longest pause between starts."}
  ]

  defp schema, do: @schema

  @spec options_docs() :: String.t()
  def options_docs, do: Options.docs(@schema)

  @doc "The name of an instance with these options, which must be a keyword list."
  @spec name(keyword) :: atom
  def name(opts) do
    unless Keyword.keyword?(opts),
      do: raise(ArgumentError, "the options of an instance must be a keyword list")

    case Options.check(:name, :atom, opts[:name]) do
      {:ok, name} -> name || @name
      {:error, _field, message} -> raise ArgumentError, message
    end
  end

  @doc "Starts an instance; with `yields?: true` one that ends as soon as somebody else starts one of its name."
  @spec start_link(keyword, [{:yields?, boolean}]) :: Supervisor.on_start()
  def start_link(opts, how \\ []) do
    config = config(opts)

    [keeper, own, sidecars] =
      for name <- ~w(Keeper Supervisor Sidecars), do: Module.concat(config[:name], name)

    journal = Queue.journal(config)

    Keeper.start_link(
      [
        name: keeper,
        child: {Supervisor, :start_link, [__MODULE__, config, [name: own]]},
        type: :supervisor,
        names: [own, sidecars, config[:name] | List.wrap(journal)]
      ] ++ how
    )
  end

  @doc "Every option of an instance, given, configured or default. What is wrong is a mistake in the program, and raised."
  @spec config(keyword) :: keyword
  def config(opts) do
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

  @impl true
  def init(config) do
    layout = layout(config)
    config = [layout: layout] ++ config

    sidecars =
      if config[:enabled],
        do: for(seat <- layout, do: sidecar_child(config, seat.index, seat.kind, seat.role)),
        else: []

    journal =
      if config[:journal],
        do: [
          {Journal,
           name: Queue.journal(config), instance: config[:name], folder: config[:journal]}
        ],
        else: []

    children =
      journal ++
        [
          {Queue, config},
          %{
            id: :sidecars,
            type: :supervisor,
            start:
              {Supervisor, :start_link,
               [
                 sidecars,
                 [strategy: :one_for_one, name: sidecars_name(config[:name])] ++ @restarts
               ]}
          }
        ]

    Supervisor.init(children, [strategy: :rest_for_one] ++ @restarts)
  end

  # The sidecars of the configuration, and behind them the spares of each kind.
  defp layout(config) do
    kinds =
      case config[:sidecars] do
        count when is_integer(count) -> List.duplicate([], count)
        kinds -> kinds
      end

    spares = for kind <- Enum.uniq(kinds), _ <- 1..config[:standby]//1, do: {kind, :standby}

    for {{kind, role}, index} <- Enum.with_index(Enum.map(kinds, &{&1, :active}) ++ spares, 1),
        do: %{index: index, kind: kind, role: role}
  end

  defp sidecar_child(config, index, kind, role) do
    sidecar = {index, Keyword.merge(config, kind), role}

    kept = [
      child: {Sidecar, :start_link, [sidecar]},
      # Longer than everything that its `terminate/2` may wait for.
      shutdown: config[:shutdown_grace] + 7_000
    ]

    %{
      id: {Sidecar, index},
      type: :supervisor,
      start: {Keeper, :start_link, [kept]}
    }
  end

  defp sidecars_name(name), do: Module.concat(name, "Sidecars")

  @doc false
  # Called by whoever asks for it, not by the queue, which must not wait for a process to end.
  @spec add_sidecar(atom, pos_integer, keyword) :: :ok | {:error, term}
  def add_sidecar(name, index, config) do
    child = sidecar_child(config, index, [], :active)
    with {:ok, _pid} <- with_sidecars(name, &Supervisor.start_child(&1, child)), do: :ok
  end

  @doc false
  @spec remove_sidecar(atom, pos_integer) :: :ok | {:error, :not_running}
  def remove_sidecar(name, index) do
    with_sidecars(name, fn sidecars ->
      _ = Supervisor.terminate_child(sidecars, {Sidecar, index})
      _ = Supervisor.delete_child(sidecars, {Sidecar, index})
      :ok
    end)
  end

  defp with_sidecars(name, fun) do
    fun.(sidecars_name(name))
  catch
    :exit, _reason -> {:error, :not_running}
  end
end
