defmodule StarweaveImage.Supervisor do
  @moduledoc false
  # One running instance:
  #
  #     StarweaveImage.Supervisor (rest_for_one)
  #     ├── StarweaveImage.Queue, registered as the instance's name
  #     └── sidecar supervisor (one_for_one)
  #         └── StarweaveImage.Sidecar × sidecars ── log reader ═ port ═ Python
  #
  # The queue comes first and outlives sidecars: it owns what must survive. If it dies itself, nobody
  # knows what the sidecars work on, so they are started anew behind it.

  use Supervisor

  alias StarweaveImage.{Options, Queue, Sidecar}

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

  @day 86_400_000
  @schema [
    name: {:atom, StarweaveImage, "Registered name; callers choose an instance by `:instance`."},
    enabled: {:boolean, true, "false starts no Python; requests answer `:disabled`."},
    models:
      {{:custom,
        "a list of model ids and {id, path: …, revision: …}, paths in UTF-8 and revisions of A-Z a-z 0-9 . _ / -",
        &__MODULE__.models/1}, [],
       "What may be loaded beside the catalog's local copies: a hub id may be downloaded on first use, a `:path` is a local folder in diffusers layout."},
    default_model: {:model_id, "starweave/tiny", "Used when a request names none."},
    sidecars: {{:integer, 1, 16}, 1, "Python processes."},
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
    offload:
      {{:one_of, [:auto, :none, :model, :sequential]}, :auto,
       "Whether a model's weights wait in main memory and visit the device by network or by layer: slower, for models that do not fit. `:auto` looks at what is free."},
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
      {{:integer, 0, 1_099_511_627_776}, 268_435_456, "The same in bytes of input."},
    max_attempts: {{:integer, 1, 100}, 3, "Times that a request may see its Python process die."},
    result_ttl: {{:integer, 0, @day}, 600_000, "ms that the result of `submit/2` is kept."},
    max_results: {{:integer, 1, 1_000_000}, 256, "How many such results are kept."},
    start_timeout: {{:integer, 1, @day}, 120_000, "ms from start to `ready`."},
    heartbeat_interval: {{:integer, 50, 10_000}, 1_000, "ms."},
    heartbeat_timeout:
      {{:integer, 1, @day}, 15_000, "ms without a heartbeat until it is killed."},
    stall_timeout:
      {{:integer, 1, @day}, 120_000, "ms without any step while busy until it is killed."},
    load_timeout: {{:integer, 1, @day}, 3_600_000, "ms that loading a model may take."},
    shutdown_grace:
      {{:integer, 0, 600_000}, 2_000, "ms for running work when the instance stops."},
    backoff_min: {{:integer, 1, @day}, 500, "ms before the second start in a row that fails."},
    backoff_max: {{:integer, 1, @day}, 30_000, "ms, the longest pause between starts."}
  ]

  @spec options_docs() :: String.t()
  def options_docs, do: Options.docs(@schema)

  @spec start_link(keyword) :: Supervisor.on_start()
  def start_link(opts) do
    name = Keyword.get(opts, :name, StarweaveImage)
    opts = Keyword.merge(Application.get_env(:starweave_image, name, []), opts)

    case Options.validate(opts, @schema) do
      {:ok, config} ->
        config = Map.to_list(config)
        Supervisor.start_link(__MODULE__, config, name: Module.concat(name, "Supervisor"))

      # A mistake in the program, as with any child specification.
      {:error, _field, message} ->
        raise ArgumentError, message
    end
  end

  @impl true
  def init(config) do
    sidecars =
      if config[:enabled], do: Enum.map(1..config[:sidecars], &{Sidecar, {&1, config}}), else: []

    children = [
      {Queue, config},
      %{
        id: :sidecars,
        type: :supervisor,
        start: {Supervisor, :start_link, [sidecars, [strategy: :one_for_one]]}
      }
    ]

    Supervisor.init(children, strategy: :rest_for_one)
  end
end
