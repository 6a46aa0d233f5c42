defmodule StarweaveImage.Client do
  @moduledoc """
  The image client of STARWEAVE, with its functions, shapes and error strings, on an instance of
  `StarweaveImage`.

      {:ok, _pid} = StarweaveImage.Client.start_link(enabled: true)

      if StarweaveImage.Client.available?() do
        {:ok, data, metadata} = StarweaveImage.Client.generate_image("a red apple", seed: 7)
        File.write!("apple.png", data)
        metadata.model #=> "starweave/tiny"
      end

  As a child of a supervisor, beside an instance that the application starts itself:

      children = [StarweaveImage, {StarweaveImage.Client, enabled: true}]

  If no instance runs, the client starts one and owns it. Callers talk to the instance directly and not through the
  client's process, so none waits for another.

  Code that calls a client by another name keeps that name. The following module has the functions below, and each of
  them asks the client that is started under the module's own name:

      defmodule StarweaveLlm.ImageGeneration.Client do
        use StarweaveImage.Client
      end

  New code should call `StarweaveImage` itself, which has progress, cancellation and errors of different kinds.
  """

  use GenServer
  require Logger

  alias StarweaveImage.{Config, Error, Image, Keeper, Options, Request}

  # The model for requests that name none, and the other model that the old server offered. Both were deleted from the
  # hub, so there must be an answer where no copy exists.
  @default_model "runwayml/stable-diffusion-v1-5"
  @gone [@default_model, "stabilityai/stable-diffusion-2-1"]
  @defaults [width: 512, height: 512, steps: 20, guidance_scale: 7.5]

  @disabled "Image generation is disabled"
  @unavailable "Image generation service is not available"
  @timed_out "Image generation timed out"
  @failed "Image generation failed"

  @start_wait_ms 60_000

  # Callers of this interface keep seeds in signed 32-bit integers.
  @seeds 0x80000000

  @own [
    name: {:atom, __MODULE__, ""},
    enabled: {:boolean, true, ""},
    instance: {:atom, StarweaveImage, ""}
  ]
  @asking [client: {:atom, __MODULE__, ""}, wait: {:boolean, true, ""}]

  @type metadata :: %{
          model: String.t(),
          generation_time_ms: non_neg_integer,
          seed: non_neg_integer,
          generated_at: DateTime.t(),
          debug_info: %{String.t() => String.t()}
        }
  @type model :: %{
          id: String.t(),
          name: String.t(),
          description: String.t(),
          capabilities: [String.t()],
          parameters: %{String.t() => String.t()},
          available: boolean
        }

  @doc false
  defmacro __using__(_opts) do
    quote do
      @doc false
      def child_spec(opts), do: StarweaveImage.Client.child_spec([name: __MODULE__] ++ opts)

      @doc false
      def start_link(opts \\ []), do: StarweaveImage.Client.start_link([name: __MODULE__] ++ opts)

      @doc false
      def generate_image(prompt, opts \\ []),
        do:
          StarweaveImage.Client.generate_image(prompt, StarweaveImage.Client.of(__MODULE__, opts))

      @doc false
      def list_models(opts \\ []),
        do: StarweaveImage.Client.list_models(StarweaveImage.Client.of(__MODULE__, opts))

      @doc false
      def available?(opts \\ []),
        do: StarweaveImage.Client.available?(StarweaveImage.Client.of(__MODULE__, opts))
    end
  end

  @doc """
  The client as a child of a supervisor.

      iex> StarweaveImage.Client.child_spec(enabled: false).id
      StarweaveImage.Client
      iex> StarweaveImage.Client.child_spec(name: MyApp.Client).id
      MyApp.Client
  """
  @spec child_spec(keyword) :: Supervisor.child_spec()
  def child_spec(opts) do
    {own, _instance} = own(opts)
    # Stopping waits for the instance, which has its own limits.
    %{id: own.name, start: {__MODULE__, :start_link, [opts]}, shutdown: :infinity}
  end

  @doc """
  Starts the client.

  It is registered as `name:` (default: this module). `enabled: false` disables it. `instance:` names the instance to
  use (default: `StarweaveImage`); if that one does not run, the client starts it with the remaining options, which are
  those of an instance. `host:` and `port:` are accepted and have no effect, since there is no server.

  Raises `ArgumentError` on a wrong option.

      iex> {:ok, client} = StarweaveImage.Client.start_link(host: "localhost", port: 50051, enabled: false)
      iex> StarweaveImage.Client.generate_image("a red apple")
      {:error, "Image generation is disabled"}
      iex> GenServer.stop(client)
      :ok
  """
  @spec start_link(keyword) :: GenServer.on_start()
  def start_link(opts \\ []) do
    {own, instance} = own(opts)
    # A wrong option of the instance raises here, in the process of the caller who wrote it.
    _ = Config.new([name: own.instance] ++ instance)
    client = [__MODULE__, {own, instance}, [name: own.name]]

    # The keeper restarts the client's process, so the host's supervisor never needs to.
    Keeper.start_link(
      name: Module.concat(own.name, "Keeper"),
      child: {GenServer, :start_link, client},
      names: [own.name]
    )
  end

  defp own(opts) do
    unless Keyword.keyword?(opts),
      do: raise(ArgumentError, "the options of a client must be a keyword list")

    {own, instance} = opts |> Keyword.drop([:host, :port]) |> Keyword.split(Keyword.keys(@own))
    {checked(own, @own), instance}
  end

  defp checked(opts, schema) do
    case Options.validate(opts, schema) do
      {:ok, values} -> values
      {:error, _field, message} -> raise ArgumentError, message
    end
  end

  @doc """
  Makes one image. Returns the bytes of the PNG file and how it was made.

  The options are those of `StarweaveImage.generate/2`, as a keyword list or a map; names may be strings. `:client`
  names the client (default: this module). An option that is left out, nil or empty has the default of this interface:
  512×512 pixels, 20 steps (or as `:effort` says), guidance 7.5, a random seed, and the model
  `"runwayml/stable-diffusion-v1-5"`, unless the instance has a `:default_model` of its own.

  That model and `"stabilityai/stable-diffusion-2-1"` were deleted from the hub. Where this machine has no copy, the
  instance's default model draws instead: `metadata.model` names it, and `metadata.debug_info` has the notes
  `"requested_model"` and `"notice"`.

  A random seed (none given, or -1) is below 2³¹, so it fits an `int32`. With an `:id`, a second call must draw the same
  seed, so the request draws it, below 2⁵³. A given seed may be up to 2⁶³ - 1 and is reported unchanged.

  An error is a sentence: one of `"Image generation is disabled"`, `"Image generation service is not available"`,
  `"Image generation timed out"`, `"Image generation failed"` (the log says more), or what is wrong with the request.

      iex> StarweaveImage.Client.generate_image("a red apple", width: 250)
      {:error, "width must be a multiple of 8 from 64 to 4096, got 250"}
      iex> StarweaveImage.Client.generate_image("a red apple", %{"width" => 250})
      {:error, "width must be a multiple of 8 from 64 to 4096, got 250"}
  """
  @spec generate_image(String.t(), keyword | map | [{String.t(), term}]) ::
          {:ok, binary, metadata} | {:error, String.t()}
  def generate_image(prompt, opts \\ []) do
    {client, opts} = opts |> Request.with_atoms() |> pop_client()

    with {:ok, instance} <- instance(client),
         {:ok, image, debug_info} <- generate(prompt, settings(opts, instance)) do
      {:ok, image.data, metadata(image, debug_info)}
    else
      {:error, error} -> {:error, sentence(error)}
    end
  end

  @doc false
  # The options of a call of a module that uses this one.
  @spec of(module, term) :: term
  def of(client, opts) when is_map(opts), do: Map.put(opts, :client, client)
  def of(client, opts) when is_list(opts), do: [{:client, client} | opts]
  def of(_client, opts), do: opts

  # Options that are no list or map are refused later, with the reason.
  defp pop_client(opts) do
    {own, opts} =
      cond do
        Keyword.keyword?(opts) -> Keyword.split(opts, [:client])
        is_map(opts) and not is_struct(opts) -> Map.split(opts, [:client])
        true -> {[], opts}
      end

    {checked(own, Keyword.take(@asking, [:client])).client, opts}
  end

  @doc """
  The models that the instance knows. `available` says whether a request for the model can work on this machine.

      {:ok, [%{id: "starweave/tiny", capabilities: ["text_to_image"], available: true} | _]} =
        StarweaveImage.Client.list_models()

      iex> StarweaveImage.Client.list_models()
      {:error, "Image generation service is not available"}

  The options are those of `available?/1`.
  """
  @spec list_models(keyword) :: {:ok, [model]} | {:error, String.t()}
  def list_models(opts \\ []) do
    opts = checked(opts, @asking)

    with {:ok, instance} <- instance(opts.client),
         :ok <- up(instance, opts),
         models when is_list(models) <- StarweaveImage.models(instance: instance) do
      {:ok, Enum.map(models, &model/1)}
    else
      {:error, %Error{kind: :disabled}} -> {:ok, []}
      {:error, _not_up} -> {:error, @unavailable}
    end
  end

  @doc """
  Whether images can be made.

  It answers at once, also while an image is made. Only while Python starts it waits for the outcome, at most a minute,
  as a script needs it. With `wait: false` it never waits, and is false while Python starts: use that in a LiveView's
  `mount/3` and wherever nothing may block. `:client` names the client (default: this module).

      iex> StarweaveImage.Client.available?()
      false
      iex> StarweaveImage.Client.available?(wait: false)
      false
  """
  @spec available?(keyword) :: boolean
  def available?(opts \\ []) do
    opts = checked(opts, @asking)

    with {:ok, instance} <- instance(opts.client),
         :ok <- up(instance, opts),
         do: true,
         else: (_ -> false)
  end

  defp up(instance, %{wait: true}),
    do: StarweaveImage.await_ready(@start_wait_ms, instance: instance)

  defp up(instance, %{wait: false}) do
    if StarweaveImage.available?(instance: instance), do: :ok, else: {:error, :starting_or_down}
  end

  @doc false
  # What this interface says about an image, besides its bytes.
  @spec metadata(Image.t(), %{String.t() => String.t()}) :: metadata
  def metadata(%Image{} = image, debug_info \\ %{}) do
    facts = Map.take(image, [:width, :height, :steps, :guidance_scale, :scheduler, :attempts])
    times = for {name, ms} <- image.timings, do: {"#{name}_ms", ms}
    facts = for {name, value} <- facts, value != nil, do: {Atom.to_string(name), value}
    notices = if image.notices == [], do: [], else: [{"notices", Enum.join(image.notices, " ")}]

    %{
      model: image.model,
      generation_time_ms: Map.get(image.timings, :total, 0),
      seed: image.seed,
      generated_at: DateTime.utc_now(),
      debug_info:
        for({name, value} <- facts ++ times ++ notices, into: %{}, do: {name, to_string(value)})
        |> Map.put("request_id", image.id)
        |> Map.merge(debug_info)
    }
  end

  @impl true
  def init({own, opts}) do
    # So that `terminate/2` runs, and stops the instance before this process ends.
    Process.flag(:trap_exit, true)
    # Callers read the instance's name from a table, so that none of them waits for this process.
    :ets.new(table(own.name), [:named_table, :protected, read_concurrency: true])

    if own.enabled do
      :ets.insert(table(own.name), {:instance, {:ok, own.instance}})
      start_instance(own.instance, opts)
    else
      :ets.insert(table(own.name), {:instance, {:error, Error.new(:disabled, @disabled)}})
      {:ok, %{owned: nil}}
    end
  end

  defp start_instance(instance, opts) do
    # Whether the client or the host comes first: this instance stops when the host starts one of the same name.
    case StarweaveImage.Supervisor.start_link([name: instance] ++ opts, yields?: true) do
      {:ok, pid} -> {:ok, %{owned: pid}}
      {:error, {:already_started, _pid}} -> {:ok, %{owned: nil}}
      {:error, reason} -> {:stop, reason}
    end
  end

  @impl true
  def handle_info({:EXIT, pid, {:shutdown, :yielded}}, %{owned: pid} = state),
    do: {:noreply, %{state | owned: nil}}

  def handle_info({:EXIT, pid, reason}, %{owned: pid} = state),
    do: {:stop, reason, %{state | owned: nil}}

  def handle_info(_message, state), do: {:noreply, state}

  @impl true
  def terminate(_reason, %{owned: nil}), do: :ok
  def terminate(_reason, %{owned: pid}), do: Supervisor.stop(pid, :shutdown)

  # Without a client, the default instance answers.
  defp instance(client) do
    :ets.lookup_element(table(client), :instance, 2)
  rescue
    ArgumentError -> {:ok, StarweaveImage}
  end

  defp table(client), do: Module.concat(client, "Instance")

  # On the old server's wire an unset field was an empty string, and -1 asked for a random seed.
  defp settings(opts, instance) do
    if Keyword.keyword?(opts) do
      given =
        Enum.reject(opts, fn {name, value} ->
          value in [nil, ""] or {name, value} == {:seed, -1}
        end)

      seed = if given[:id], do: nil, else: :rand.uniform(@seeds) - 1

      # The number of steps would go before an effort that was asked for.
      defaults = if given[:effort], do: Keyword.delete(@defaults, :steps), else: @defaults

      defaults
      |> Keyword.merge(model: model_unless_configured(instance), instance: instance, seed: seed)
      |> Keyword.merge(given)
    else
      # Refused later, with the reason.
      opts
    end
  end

  defp model_unless_configured(instance) do
    case StarweaveImage.status(instance: instance).default_model do
      "starweave/tiny" -> @default_model
      configured -> configured
    end
  end

  defp generate(prompt, settings) do
    if Keyword.keyword?(settings) and settings[:model] in @gone,
      do: generate_gone(prompt, settings),
      else: draw(prompt, settings)
  end

  defp generate_gone(prompt, settings) do
    started = System.monotonic_time(:millisecond)

    with false <- absent?(settings),
         {:error, %Error{kind: :model_not_found}} <- draw(prompt, settings) do
      spent = System.monotonic_time(:millisecond) - started
      timeout = settings[:timeout] && max(settings[:timeout] - spent, 1)
      draw_instead(prompt, Keyword.put(settings, :timeout, timeout))
    else
      true -> draw_instead(prompt, settings)
      answer -> answer
    end
  end

  # If the model is known to be absent, no request has to fail first to find that out.
  defp absent?(settings) do
    with cards when is_list(cards) <- StarweaveImage.models(instance: settings[:instance]),
         do:
           Enum.any?(cards, &(&1.state == :absent and settings[:model] in [&1.id | &1.aliases])),
         else: (_ -> false)
  end

  defp draw_instead(prompt, settings) do
    with {:ok, image, _} <- draw(prompt, Keyword.put(settings, :model, nil)),
         do: {:ok, image, substituted(settings[:model], image.model)}
  end

  defp draw(prompt, settings) do
    with {:ok, image} <- StarweaveImage.generate(prompt, settings), do: {:ok, image, %{}}
  end

  defp substituted(gone, model) do
    %{
      "requested_model" => gone,
      "notice" => "#{gone} is not on this machine: #{model} took its place"
    }
  end

  defp model(card) do
    %{
      id: card.id,
      name: card.name,
      description: card.description,
      capabilities: card.tasks,
      parameters: parameters(card),
      available: card.state in [:loaded, :loading, :available, :remote]
    }
  end

  defp parameters(card) do
    defaults = for {name, value} <- card.defaults, value != nil, do: {"default_#{name}", value}
    limits = for {name, value} <- card.limits, do: {Atom.to_string(name), value}

    for {name, value} <- defaults ++ limits,
        into: %{
          "aliases" => Enum.join(card.aliases, ", "),
          "licence" => card.licence,
          "pipeline" => card.pipeline,
          "state" => Atom.to_string(card.state)
        },
        do: {name, to_string(value)}
  end

  defp sentence(%Error{kind: :disabled}), do: @disabled
  defp sentence(%Error{kind: :unavailable}), do: @unavailable
  defp sentence(%Error{kind: :timeout}), do: @timed_out

  defp sentence(%Error{kind: kind} = error) when kind in [:internal, :sidecar_crashed] do
    Logger.error("#{@failed}: #{error.message}")
    @failed
  end

  defp sentence(%Error{message: message}), do: message
end
