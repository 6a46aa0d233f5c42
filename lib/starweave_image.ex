defmodule StarweaveImage do
  @external_resource "README.md"

  @moduledoc """
  Image generation as a supervised part of an Elixir application.

  A long-lived Python process, the *sidecar*, runs stock Hugging Face diffusers pipelines; this
  library starts it, speaks with it over a port, watches its health, and owns every request until it
  has its one answer.

      children = [
        MyApp.Repo,
        {StarweaveImage, models: ["stabilityai/sdxl-turbo"], default_model: "stabilityai/sdxl-turbo"},
        MyAppWeb.Endpoint
      ]

  and anywhere in the application

      {:ok, image} = StarweaveImage.generate("a red apple", width: 256, height: 256)
      :ok = StarweaveImage.Image.save(image, "apple.png")

  Without any `:models` it works offline at once, on the small embedded model `starweave/tiny`. The
  Python environment is made once by `mix image.setup`, or in a release by `setup/1`.

  ## Options of an instance

  Given in the child specification, or as `config :starweave_image, StarweaveImage, …` under the
  instance's name:

  #{StarweaveImage.Supervisor.options_docs()}

  ## Options of a request

  #{StarweaveImage.Request.options_docs()}

  ## What is promised

  An accepted request ends with its images or with one `StarweaveImage.Error`, whatever dies.
  `generate/2`, `generate_many/3` and `stream/2` cancel the work when their caller dies; `submit/2` does not. When the
  Python process dies or hangs, what it was running is sent again with the same seed, at most `:max_attempts`
  times; with `:standby` a spare process takes over at once. What failed in a way that may pass is tried again. No function here
  leaves a message in the caller's mailbox, but those that were asked for with `subscribe/1`.

  In an instance with a `:journal`, what is submitted with `durable: true` outlives the BEAM: it is on disk when `submit/2` returns,
  goes on with the next start, and its result is kept there for `:result_ttl`.

  Users of a priority are served one by one. A request has four time-outs that do not stand in for each other: `:queue_timeout`,
  `:run_timeout` and `:timeout` of the request, and the instance's `:heartbeat_timeout`, which costs no request.
  """

  alias StarweaveImage.{Environment, Error, Image, Options, Request}

  @type id :: String.t()
  @type event ::
          {:queued,
           %{
             position: pos_integer,
             attempt: pos_integer,
             estimated_start_ms: non_neg_integer | nil
           }}
          | {:progress, map}
          | {:preview, preview}
          | {:image, Image.t()}
          | {:error, Error.t()}

  @typedoc """
  How image number `image` (from 0) of request `id` stands after `step` steps: a picture file of at most 256 pixels a side.
  """
  @type preview :: %{
          id: id,
          image: non_neg_integer,
          step: pos_integer,
          format: :jpeg | :png | :webp,
          width: pos_integer,
          height: pos_integer,
          data: binary
        }

  # How much later than a request's own deadline its answer may come before the queue counts as dead.
  @slack_ms 5_000

  @doc """
  An instance as a child of a supervisor.

      iex> StarweaveImage.child_spec(name: MyApp.Images).id
      MyApp.Images
  """
  @spec child_spec(keyword) :: Supervisor.child_spec()
  def child_spec(opts) do
    %{
      id: Keyword.get(opts, :name, __MODULE__),
      start: {__MODULE__, :start_link, [opts]},
      type: :supervisor
    }
  end

  @doc """
  Starts an instance and links it to the caller. Returns before Python is up: see `status/1`.

  Raises `ArgumentError` on a wrong option.

      iex> {:ok, pid} = StarweaveImage.start_link(name: MyApp.NoImages, enabled: false)
      iex> StarweaveImage.status(MyApp.NoImages).state
      :disabled
      iex> Supervisor.stop(pid)
      :ok
  """
  @spec start_link(keyword) :: Supervisor.on_start()
  defdelegate start_link(opts \\ []), to: StarweaveImage.Supervisor

  @doc """
  Makes one image and waits for it.

  The work is cancelled if the caller dies or `:timeout` passes. Options: see the module.

      {:ok, image} = StarweaveImage.generate("a red apple", seed: 7)
      image.seed #=> 7

      iex> {:error, error} = StarweaveImage.generate("a red apple", steps: 0)
      iex> {error.kind, error.details.field}
      {:invalid_request, :steps}
  """
  @spec generate(String.t(), keyword | map) :: {:ok, Image.t()} | {:error, Error.t()}
  def generate(prompt, opts \\ []) do
    with {:ok, [image | _]} <- generate_images(prompt, opts), do: {:ok, image}
  end

  @doc """
  As `generate/2`, but raises the `StarweaveImage.Error`.

      image = StarweaveImage.generate!("a red apple")
  """
  @spec generate!(String.t(), keyword | map) :: Image.t()
  def generate!(prompt, opts \\ []) do
    case generate(prompt, opts) do
      {:ok, image} -> image
      {:error, error} -> raise error
    end
  end

  @doc """
  Makes `n` images (1 to 16) in one request, image k with seed `seed + k`.

      {:ok, images} = StarweaveImage.generate_many("a red apple", 4, seed: 1)
      Enum.map(images, & &1.seed) #=> [1, 2, 3, 4]

      iex> {:error, error} = StarweaveImage.generate_many("a red apple", 0)
      iex> error.message
      "num_images must be an integer from 1 to 16, got 0"
  """
  @spec generate_many(String.t(), pos_integer, keyword | map) ::
          {:ok, [Image.t()]} | {:error, Error.t()}
  def generate_many(prompt, n, opts \\ []), do: generate_images(prompt, put(opts, :num_images, n))

  defp generate_images(prompt, opts) do
    with {:ok, request} <- Request.new(prompt, opts),
         {:ok, answer} <-
           call(request.instance, {:generate, request}, request.timeout + @slack_ms),
         do: answer
  end

  @doc """
  Makes a picture anew as `prompt` says, starting from `image`: a file's bytes or a `StarweaveImage.Image`.

  `:strength` (0 to 1, 0.8 unless given) is how far it may be left. The result has the size of `image`,
  within the model's limits, unless `:width` and `:height` say otherwise.

      {:ok, apple} = StarweaveImage.generate("a red apple")
      {:ok, pear} = StarweaveImage.edit(apple, "a green pear", strength: 0.7)

      iex> {:error, error} = StarweaveImage.edit(:apple, "a green pear")
      iex> error.message
      "image must be a PNG, JPEG or WebP file of at most 12 MiB, got :apple"
  """
  @spec edit(binary | Image.t(), String.t(), keyword | map) ::
          {:ok, Image.t()} | {:error, Error.t()}
  def edit(image, prompt, opts \\ []), do: generate(prompt, put(opts, :image, file(image)))

  @doc """
  Makes anew what is white in `mask`, as `prompt` says; where the mask is black or transparent the picture stays as it
  is, to the pixel.

  `image` and `mask` are files' bytes of the same size in pixels, or a `StarweaveImage.Image`. Otherwise as `edit/3`.

      {:ok, house} = StarweaveImage.generate("a house on green hills")
      {:ok, evening} = StarweaveImage.inpaint(house, File.read!("sky.png"), "the sky at sunset", strength: 1.0)

      iex> {:error, error} = StarweaveImage.inpaint(<<0x89, "PNG\\r\\n", 0x1A, "\\n", 0::64>>, "no mask", "a sky")
      iex> error.details.field
      :mask
  """
  @spec inpaint(binary | Image.t(), binary | Image.t(), String.t(), keyword | map) ::
          {:ok, Image.t()} | {:error, Error.t()}
  def inpaint(image, mask, prompt, opts \\ []),
    do: edit(image, prompt, put(opts, :mask, file(mask)))

  @doc """
  Several pictures of the same thing: four, or `:num_images`, each with a seed of its own that it reports.

  Of a prompt they differ by their seeds alone; with `:variation_strength` (0 to 1) each goes only so far from the picture of
  `:seed`, which is the first of them, towards its own. Any of them comes again by `:seed` and `:variation_strength` as
  they were, with its own seed as `:variation_seed`. Of a `StarweaveImage.Image` or of a file's bytes they start from that
  picture and leave it as far as `:strength` says (0.6 unless given); an image brings its prompt, for a file
  `:prompt` says what it shows.

      {:ok, [one, two]} = StarweaveImage.variations("a red apple", num_images: 2)
      {:ok, nearby} = StarweaveImage.variations(one, strength: 0.3)
      {:ok, [_one_again | alike]} = StarweaveImage.variations("a red apple", seed: one.seed, variation_strength: 0.3)

      iex> {:error, error} = StarweaveImage.variations(<<0x89, "PNG\\r\\n", 0x1A, "\\n", 0::64>>)
      iex> error.message
      "prompt is required"
  """
  @spec variations(String.t() | binary | Image.t(), keyword | map) ::
          {:ok, [Image.t()]} | {:error, Error.t()}
  def variations(image_or_prompt, opts \\ []) do
    {prompt, opts} = pop(opts, :prompt)
    opts = put_new(opts, :num_images, 4)

    cond do
      is_struct(image_or_prompt, Image) ->
        vary(image_or_prompt.data, prompt || image_or_prompt.prompt, opts)

      is_binary(image_or_prompt) and Options.image?(image_or_prompt) ->
        vary(image_or_prompt, prompt, opts)

      true ->
        generate_images(image_or_prompt, opts)
    end
  end

  defp vary(image, prompt, opts),
    do: generate_images(prompt, opts |> put(:image, image) |> put_new(:strength, 0.6))

  defp file(%Image{data: data}), do: data
  defp file(other), do: other

  @doc """
  Hands a request in and returns once it is accepted. It outlives the caller: ask for the result
  with `await/2`, from any process, or watch it with `subscribe/1`.

  With `:id` it is idempotent: asking again for the same under an id that is known joins that request, whether it waits, runs or is
  done, and asking for something else under it is `:invalid_request` with `details.conflict`. Results are kept for the instance's `:result_ttl`.

  With `durable: true` it returns when the request is on disk, in the instance's `:journal`; it goes on with the next start when the
  BEAM ends before it is done, and its result outlives the BEAM too.

      {:ok, id} = StarweaveImage.submit("a red apple", id: "order-17")
      {:ok, image} = StarweaveImage.await(id)
  """
  @spec submit(String.t(), keyword | map) :: {:ok, id} | {:error, Error.t()}
  def submit(prompt, opts \\ []) do
    with {:ok, request} <- Request.new(prompt, opts),
         # However long it takes: it is accepted then, and who did not hear of it would ask for it twice.
         {:ok, answer} <- call(request.instance, {:submit, request, nil, nil}, :infinity),
         do: answer
  end

  @doc """
  Waits up to `timeout` ms for a request that was submitted. A time-out here does not touch the work.

  A request of several images gives its first; `await_many/3` gives all.
  """
  @spec await(id, timeout_ms :: pos_integer, instance :: atom) ::
          {:ok, Image.t()} | {:error, Error.t()}
  def await(id, timeout \\ 600_000, instance \\ __MODULE__) do
    with {:ok, [image | _]} <- await_many(id, timeout, instance), do: {:ok, image}
  end

  @doc "As `await/3`, for all images of the request."
  @spec await_many(id, timeout_ms :: pos_integer, instance :: atom) ::
          {:ok, [Image.t()]} | {:error, Error.t()}
  def await_many(id, timeout \\ 600_000, instance \\ __MODULE__) do
    with {:ok, answer} <- call(instance, {:await, id}, timeout), do: answer
  end

  @doc """
  A request as a lazy stream of its events, ending with `{:image, image}` (one for each) or
  `{:error, error}`. Whoever consumes it owns the request: leaving the stream early cancels
  it, unless somebody else waits for it too.

      for event <- StarweaveImage.stream("a red apple", preview: true) do
        case event do
          {:queued, %{position: n}} -> IO.puts("number \#{n} in the queue")
          {:progress, p} -> IO.puts("\#{p.phase} \#{p.step}/\#{p.steps}")
          {:preview, preview} -> File.write!("apple.preview.jpg", preview.data)
          {:image, image} -> StarweaveImage.Image.save(image, "apple.png")
          {:error, error} -> IO.puts(error.message)
        end
      end

  Previews come with `preview: true` only.
  """
  @spec stream(String.t(), keyword | map) :: Enumerable.t()
  def stream(prompt, opts \\ []) do
    Stream.resource(fn -> open_stream(prompt, opts) end, &next_event/1, &close_stream/1)
  end

  # An alias, not a pid: once it is taken back, no late event can reach the caller's mailbox.
  defp open_stream(prompt, opts) do
    with {:ok, request} <- Request.new(prompt, opts) do
      reference = :erlang.alias()
      monitor = Process.monitor(request.instance)

      case call(request.instance, {:submit, request, self(), {:alias, reference}}, :infinity) do
        {:ok, {:ok, id}} -> {:open, request.instance, id, reference, monitor}
        {:ok, {:error, error}} -> {:refused, error, reference, monitor}
        {:error, error} -> {:refused, error, reference, monitor}
      end
    else
      {:error, error} -> {:refused, error, nil, nil}
    end
  end

  defp next_event({:refused, error, reference, monitor}),
    do: {[{:error, error}], {:ended, reference, monitor}}

  defp next_event({:ended, _reference, _monitor} = ended), do: {:halt, ended}

  defp next_event({:open, instance, _id, reference, monitor} = open) do
    receive do
      {^reference, :end} -> {:halt, {:ended, reference, monitor}}
      {^reference, event} -> {[event], open}
      {:DOWN, ^monitor, _, _, _} -> {[{:error, ended(instance)}], {:ended, reference, monitor}}
    end
  end

  defp close_stream({:open, instance, id, reference, monitor}) do
    _ = call(instance, {:leave, id, self()})
    close_stream({:ended, reference, monitor})
  end

  defp close_stream({_, _error, reference, monitor}),
    do: close_stream({:ended, reference, monitor})

  defp close_stream({:ended, nil, nil}), do: :ok

  defp close_stream({:ended, reference, monitor}) do
    :erlang.unalias(reference)
    Process.demonitor(monitor, [:flush])
    drop_events(reference)
  end

  defp drop_events(reference) do
    receive do
      {^reference, _event} -> drop_events(reference)
    after
      0 -> :ok
    end
  end

  @doc """
  Sends the events of a request to the calling process as `{:starweave_image, id, event}`, with the
  same events as `stream/2`. What was so far comes at once: the place in the queue, or the last progress and preview of each image,
  or the end.

      iex> StarweaveImage.subscribe("no-such-request")
      {:error, :not_found}
  """
  @spec subscribe(id, instance :: atom) :: :ok | {:error, :not_found | Error.t()}
  def subscribe(id, instance \\ __MODULE__) do
    with {:ok, answer} <- call(instance, {:subscribe, id, {:process, self()}}), do: answer
  end

  @doc """
  Ends `subscribe/1`; when it returns, no event of the request is in the mailbox or will come.

      iex> StarweaveImage.unsubscribe("no-such-request")
      :ok
  """
  @spec unsubscribe(id, instance :: atom) :: :ok | {:error, Error.t()}
  def unsubscribe(id, instance \\ __MODULE__) do
    answer = call(instance, {:unsubscribe, id, {:process, self()}})
    drop_subscribed(id)
    with {:ok, answer} <- answer, do: answer
  end

  defp drop_subscribed(id) do
    receive do
      {:starweave_image, ^id, _event} -> drop_subscribed(id)
    after
      0 -> :ok
    end
  end

  @doc """
  Cancels a request: its callers get `:cancelled` now, the device stops before its next denoise step.

      iex> StarweaveImage.cancel("no-such-request")
      {:error, :not_found}
  """
  @spec cancel(id, instance :: atom) :: :ok | {:error, :not_found | :finished | Error.t()}
  def cancel(id, instance \\ __MODULE__) do
    with {:ok, answer} <- call(instance, {:cancel, id}, :infinity), do: answer
  end

  @doc """
  The models that the sidecar knows: id, name, description, aliases, tasks, defaults, limits,
  licence, memory estimate, `state` and the `error` of the last load; of a loaded one also the `bytes` of its
  weights, whether it is `parked` in main memory, `idle_ms` since its last use and `load_ms`, the time of its load.
  Empty until a sidecar was ready; `:unavailable` where no such instance runs.

      [%{id: "starweave/tiny", state: :loaded} | _] = StarweaveImage.models()
  """
  @spec models(instance :: atom) :: [map] | {:error, Error.t()}
  def models(instance \\ __MODULE__) do
    with {:ok, models} <- call(instance, :models), do: models
  end

  @doc """
  Loads a model into every sidecar, and waits for that.

      :ok = StarweaveImage.load_model("starweave/tiny")
  """
  @spec load_model(String.t(), keyword) :: :ok | {:error, Error.t()}
  def load_model(id, opts \\ []), do: operation("load_model", id, opts)

  @doc """
  Frees a loaded model; one in use is refused.

      :ok = StarweaveImage.unload_model("starweave/tiny")
  """
  @spec unload_model(String.t(), keyword) :: :ok | {:error, Error.t()}
  def unload_model(id, opts \\ []), do: operation("unload_model", id, opts)

  defp operation(type, id, opts) do
    instance = Keyword.get(opts, :instance, __MODULE__)
    timeout = Keyword.get(opts, :timeout, 3_600_000)

    with {:ok, model} <- model_id(id),
         {:ok, answer} <- call(instance, {:operation, type, model}, timeout),
         do: answer
  end

  defp model_id(id) do
    case Options.check(:model, :model_id, id) do
      {:ok, id} when id != nil -> {:ok, id}
      {:ok, nil} -> {:error, Error.new(:invalid_request, "model is required", %{field: :model})}
      {:error, field, message} -> {:error, Error.new(:invalid_request, message, %{field: field})}
    end
  end

  @doc """
  What the instance is doing. Answers within milliseconds, whatever runs.

  `state` is one of `:starting :loading :ready :busy :stalled :down :disabled`; `error` says in one
  sentence why a sidecar is down; `sidecars` and `queue` give the numbers. `queue.estimated_start_ms` is when a request that
  comes now would go, by what was measured, and nil while nothing is up; `queue.next` has the ids, places and estimates of the first 20 that wait.

      %{state: :ready, error: nil, sidecars: [%{device: "cpu"}], queue: %{queued: 0, running: 0}} =
        StarweaveImage.status()

      iex> StarweaveImage.status(:no_such_instance).state
      :down
  """
  @spec status(instance :: atom) :: map
  def status(instance \\ __MODULE__) do
    case call(instance, :status) do
      {:ok, status} ->
        status

      {:error, error} ->
        queue = %{
          queued: 0,
          running: 0,
          limit: 0,
          bytes: 0,
          max_bytes: 0,
          estimated_start_ms: nil,
          next: []
        }

        %{state: :down, error: error.message, default_model: nil, sidecars: [], queue: queue}
    end
  end

  @doc """
  Whether a sidecar is up. Answers at once, whatever is running; false while it starts.

      iex> StarweaveImage.available?(:no_such_instance)
      false
  """
  @spec available?(instance :: atom) :: boolean
  def available?(instance \\ __MODULE__), do: status(instance).state in [:ready, :busy, :loading]

  @doc """
  Waits until a sidecar is up, or until it is known why none can be: for scripts, which have nothing else to do meanwhile.

      :ok = StarweaveImage.await_ready()

      iex> {:error, error} = StarweaveImage.await_ready(1_000, :no_such_instance)
      iex> error.kind
      :unavailable
  """
  @spec await_ready(timeout_ms :: pos_integer, instance :: atom) :: :ok | {:error, Error.t()}
  def await_ready(timeout \\ 120_000, instance \\ __MODULE__) do
    with {:ok, answer} <- call(instance, :await_ready, timeout), do: answer
  end

  @doc """
  Starts another sidecar, for as long as the instance lives; gives its index as in `status/1`.

  Options: `:device :dtype :capacity :memory_budget :ram_budget :offload :compile`, as in `:sidecars` of the instance and else as the
  instance has them, and `:instance`.

      {:ok, 2} = StarweaveImage.add_sidecar(device: "cuda:1")

      iex> {:error, error} = StarweaveImage.add_sidecar(capacity: 0)
      iex> error.message
      "capacity must be an integer from 1 to 64, got 0"
  """
  @spec add_sidecar(keyword) :: {:ok, pos_integer} | {:error, Error.t()}
  def add_sidecar(opts \\ []) do
    {instance, opts} = Keyword.pop(opts, :instance, __MODULE__)

    with {:ok, kind} <- StarweaveImage.Supervisor.sidecar(opts),
         {:ok, {:ok, index, config}} <- call(instance, {:add_sidecar, kind}),
         :ok <- StarweaveImage.Supervisor.add_sidecar(instance, index, config) do
      {:ok, index}
    else
      {:error, field, message} -> {:error, Error.new(:invalid_request, message, %{field: field})}
      {:ok, {:error, error}} -> {:error, error}
      {:error, %Error{} = error} -> {:error, error}
      {:error, :not_running} -> {:error, gone(instance)}
      {:error, _reason} -> {:error, Error.new(:internal, "the sidecar could not be started")}
    end
  end

  @doc """
  Gives a sidecar no more requests, and returns when those that it works on are done, at the latest after `:timeout` ms (an
  hour). It goes on after `resume_sidecar/2`.

  Options: `:timeout`, `:instance`.

      :ok = StarweaveImage.drain_sidecar(2)

      iex> {:error, error} = StarweaveImage.drain_sidecar(2, instance: :no_such_instance)
      iex> error.kind
      :unavailable
  """
  @spec drain_sidecar(pos_integer, keyword) :: :ok | {:error, :not_found | :timeout | Error.t()}
  def drain_sidecar(index, opts \\ []) do
    instance = Keyword.get(opts, :instance, __MODULE__)

    case call(instance, {:drain, index}, Keyword.get(opts, :timeout, 3_600_000)) do
      {:ok, answer} -> answer
      {:error, %{kind: :timeout}} -> {:error, :timeout}
      {:error, error} -> {:error, error}
    end
  end

  @doc """
  Lets a sidecar that was drained work again.

      :ok = StarweaveImage.resume_sidecar(2)

      iex> {:error, error} = StarweaveImage.resume_sidecar(2, instance: :no_such_instance)
      iex> error.kind
      :unavailable
  """
  @spec resume_sidecar(pos_integer, keyword) :: :ok | {:error, :not_found | Error.t()}
  def resume_sidecar(index, opts \\ []) do
    with {:ok, answer} <- call(Keyword.get(opts, :instance, __MODULE__), {:resume, index}),
         do: answer
  end

  @doc """
  Ends a sidecar for good: drains it as `drain_sidecar/2` does, then stops its process. What it has not done
  within `:timeout` ms is done by another.

      :ok = StarweaveImage.remove_sidecar(2, timeout: 60_000)

      iex> {:error, error} = StarweaveImage.remove_sidecar(2, instance: :no_such_instance)
      iex> error.kind
      :unavailable
  """
  @spec remove_sidecar(pos_integer, keyword) :: :ok | {:error, :not_found | Error.t()}
  def remove_sidecar(index, opts \\ []) do
    instance = Keyword.get(opts, :instance, __MODULE__)

    with drained when drained in [:ok, {:error, :timeout}] <- drain_sidecar(index, opts),
         :ok <- StarweaveImage.Supervisor.remove_sidecar(instance, index),
         {:ok, answer} <- call(instance, {:removed, index}) do
      answer
    else
      {:error, :not_running} -> {:error, gone(instance)}
      {:error, reason} -> {:error, reason}
    end
  end

  @doc """
  Makes the Python environment, where Mix is not to be had: the function for a release.

  The same as `mix image.setup`; see `StarweaveImage.Environment.setup/1` for the options.

      $ bin/my_app eval "StarweaveImage.setup()"
  """
  @spec setup(keyword) :: {:ok, map} | {:error, Error.t()}
  defdelegate setup(opts \\ []), to: Environment

  # Every answer comes as `{:ok, answer}`; a queue that is not there, or does not answer, is an error.
  defp call(instance, message, timeout \\ @slack_ms) do
    {:ok, GenServer.call(instance, message, timeout)}
  catch
    :exit, {:timeout, _} ->
      {:error, Error.new(:timeout, "no answer within #{timeout} ms")}

    :exit, {:noproc, _} ->
      {:error, gone(instance)}

    # It answered nothing and has ended, by a fault of its own or with its supervisor.
    :exit, _reason ->
      {:error, ended(instance)}
  end

  defp gone(instance), do: unavailable("no instance named #{inspect(instance)} runs")
  defp ended(instance), do: unavailable("the instance named #{inspect(instance)} ended meanwhile")

  defp unavailable(why),
    do: Error.new(:unavailable, "image generation is not available: #{why}")

  defp put(opts, key, value) when is_map(opts), do: Map.put(opts, key, value)
  defp put(opts, key, value) when is_list(opts), do: Keyword.put(opts, key, value)
  # What is no options at all is refused further on, with the reason.
  defp put(opts, _key, _value), do: opts

  defp put_new(opts, key, value),
    do: if(get(opts, key) == nil, do: put(opts, key, value), else: opts)

  defp pop(opts, key) when is_map(opts), do: Map.pop(opts, key)

  defp pop(opts, key),
    do: if(Keyword.keyword?(opts), do: Keyword.pop(opts, key), else: {nil, opts})

  defp get(opts, key) when is_map(opts), do: opts[key]
  defp get(opts, key), do: if(Keyword.keyword?(opts), do: opts[key])
end
