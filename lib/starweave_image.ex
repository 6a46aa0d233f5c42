defmodule StarweaveImage do
  @external_resource "README.md"

  @moduledoc """
  Image generation as a supervised part of an Elixir application.

  A long-lived Python process, the *sidecar*, runs stock Hugging Face diffusers pipelines. This library starts it,
  talks to it over a port, watches its health, and owns every request until that has its one answer.

      children = [
        MyApp.Repo,
        {StarweaveImage, models: ["stabilityai/sdxl-turbo"], default_model: "stabilityai/sdxl-turbo"},
        MyAppWeb.Endpoint
      ]

  and anywhere in the application

      {:ok, image} = StarweaveImage.generate("a red apple", width: 256, height: 256)
      :ok = StarweaveImage.Image.save(image, "apple.png")

  Without any `:models` it works offline at once, with the small embedded model `starweave/tiny`. `mix image.setup`
  makes the Python environment, once on each machine; in a release `setup/1` does.

  ## Several instances

  The child specification's `:name` names an instance, and every function here takes `instance:` in its options:

      children = [
        {StarweaveImage, name: MyApp.Fast, default_model: "starweave/tiny"},
        {StarweaveImage, name: MyApp.Large, models: ["stabilityai/sdxl-turbo"], device: "cuda:1"}
      ]

      StarweaveImage.generate("a red apple", instance: MyApp.Large)
      StarweaveImage.status(instance: MyApp.Large)

  ## Options of an instance

  They are given in the child specification, or as `config :starweave_image, StarweaveImage, …` under the
  instance's name:

  #{StarweaveImage.Options.docs(StarweaveImage.Config.groups())}

  ## Options of a request

  #{StarweaveImage.Options.docs(StarweaveImage.Schema.groups())}

  ## What is promised

  An accepted request ends with its images or with one `StarweaveImage.Error`, whatever dies. `generate/2`,
  `generate_many/3` and `stream/2` cancel the work when their caller dies; `submit/2` does not.

  When the Python process dies or hangs, the requests in it are sent again with the same seeds. Each is tried until its
  deadline, or until there is evidence that this request, and nothing else, ends the process. With `:standby` a spare
  process takes over at once. A failure that may pass, such as a broken download, is tried again after a pause.

  No function leaves a message in the caller's mailbox, except the events that `subscribe/2` asks for.

  In an instance with a `:journal`, a request submitted with `durable: true` outlives the BEAM: it is on disk when
  `submit/2` returns, the next start of the instance continues it, and its result is kept there for `:result_ttl`.

  ## Errors

  A function that can fail returns `{:error, %StarweaveImage.Error{}}`; its documentation names the kinds. An argument
  or option of a wrong type or range is `:invalid_request`, before any work is done, and `details.field` names it. This
  includes a nil in place of a picture, as a lost upload leaves it. An option that is nil counts as not given. Functions
  that return no error (`status/1`, `available?/1`, `child_spec/1`, `start_link/1`) raise `ArgumentError`.

  ## What is logged

  Each request that ends, well or not, is one line at level info, with `request_id` in its metadata and without its
  prompt:

      image request 5b66cbd9… done model=starweave/tiny steps=10 images=1 queue_ms=0 total_ms=3592 attempts=1 rss_mb=505

  `queue_ms` is the time until the request was last sent to a sidecar, `total_ms` the time since its acceptance, and
  `rss_mb` the memory of the process that drew it. `Logger.put_module_level(StarweaveImage.Queue.RequestLog, :warning)`
  silences these lines alone.

  ## Fairness and time limits

  Among requests of equal priority, users take turns. Three time limits belong to a request, and none replaces
  another: `:queue_timeout` for waiting, `:run_timeout` for one attempt, `:timeout` for everything. The instance's
  `:heartbeat_timeout` is about the Python process, and costs no request.
  """

  alias StarweaveImage.{
    Config,
    Environment,
    Error,
    Image,
    Options,
    Queue,
    Request,
    Result,
    Text,
    Type
  }

  @typedoc "A request's name: 1 to 128 of `A-Z a-z 0-9 . _ : -`."
  @type id :: String.t()

  @typedoc "The options of a request, as a keyword list or a map."
  @type options :: [Request.option()] | map

  @typedoc "Which of several running instances, by its `:name`; `StarweaveImage` unless given."
  @type instance_option :: {:instance, atom}

  @typedoc "The same, and how many milliseconds to wait."
  @type waiting_option :: instance_option | {:timeout, timeout}

  @typedoc """
  What happens to a request, as `stream/2` and `subscribe/2` tell it. The last event is an error, or the last image.
  """
  @type event ::
          {:queued, queued}
          | {:progress, progress}
          | {:preview, preview}
          | {:image, Image.t()}
          | {:result, Text.t() | Result.t()}
          | {:error, Error.t()}

  @typedoc """
  The request waits at place `position` (1 is next) for its attempt number `attempt`. `estimated_start_ms` says in how
  many milliseconds that will begin, and is nil while no sidecar is up.
  """
  @type queued :: %{
          position: pos_integer,
          attempt: pos_integer,
          estimated_start_ms: non_neg_integer | nil
        }

  @typedoc """
  Image number `image` (from 0) of `num_images` has made `step` of `steps` steps, `elapsed_ms` milliseconds after
  attempt number `attempt` began. `eta_ms` says in how many milliseconds the request's last step will be made, and is
  nil before two steps were timed.
  """
  @type progress :: %{
          phase: :loading | :denoising | :decoding | :encoding,
          image: non_neg_integer,
          num_images: pos_integer,
          step: non_neg_integer,
          steps: non_neg_integer,
          elapsed_ms: non_neg_integer,
          eta_ms: non_neg_integer | nil,
          attempt: pos_integer
        }

  @typedoc """
  How image number `image` (from 0) of request `id` looks after `step` steps: a picture file of at most 256 pixels a
  side.
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

  @typedoc """
  What an instance is doing. `error` is one sentence on why a sidecar is down. `journal` is nil for an instance without
  one; else `error` says why it is not `usable?`.
  """
  @type status :: %{
          state: :starting | :loading | :ready | :busy | :stalled | :down | :disabled,
          error: String.t() | nil,
          default_model: String.t() | nil,
          sidecars: [sidecar],
          journal: %{usable?: boolean, error: String.t() | nil} | nil,
          queue: queue
        }

  @typedoc """
  How many requests wait (`queued`, of at most `limit`) and run, and the `bytes` (of at most `max_bytes`) of input that
  they hold. `estimated_start_ms` says in how many milliseconds a request that comes now would begin, from the times of
  earlier ones, and is nil while no sidecar is up. `next` has the first 20 that wait.
  """
  @type queue :: %{
          queued: non_neg_integer,
          running: non_neg_integer,
          limit: non_neg_integer,
          bytes: non_neg_integer,
          max_bytes: non_neg_integer,
          estimated_start_ms: non_neg_integer | nil,
          next: [%{id: id, position: pos_integer, estimated_start_ms: non_neg_integer | nil}]
        }

  @typedoc """
  A Python process. A `:standby` one has everything imported and takes over from an `:active` one that dies.
  `generation` counts the starts of the process. `running` are the ids of the requests that were sent to it, `requests`
  what its last heartbeat said of them, `resident` the models that it has loaded. `rss` and `device_memory` are bytes,
  `counters` requests since its start. What only the process itself can say (`device`, `dtype`, `rss`, …) is nil or
  empty while it is not up.
  """
  @type sidecar :: %{
          index: pos_integer,
          role: :active | :standby,
          state: :starting | :loading | :ready | :busy | :stalled | :down,
          draining: boolean,
          generation: non_neg_integer,
          os_pid: pos_integer | nil,
          uptime_ms: non_neg_integer,
          device: String.t() | nil,
          device_name: String.t() | nil,
          dtype: String.t() | nil,
          versions: %{optional(String.t()) => String.t()},
          capacity: non_neg_integer,
          running: [id],
          requests: [running],
          resident: [String.t()],
          device_memory: %{used: non_neg_integer, total: non_neg_integer} | nil,
          rss: non_neg_integer | nil,
          counters: %{optional(:accepted | :done | :failed | :cancelled) => non_neg_integer},
          error: String.t() | nil
        }

  @typedoc """
  A request at work in a sidecar, at `step` of `steps`. The last step was made `step_age_ms` milliseconds ago; one takes
  `step_ms`, 0 where that is not known. `waits` says whether it waits for its turn on the device.
  """
  @type running :: %{
          id: id,
          phase: String.t(),
          step: non_neg_integer,
          steps: non_neg_integer,
          step_age_ms: non_neg_integer,
          step_ms: non_neg_integer,
          waits: boolean | nil
        }

  @typedoc """
  A model's card. `defaults` hold where a request does not say otherwise, and `limits` are what it may ask for: pixels
  of a side (`min_size`, `max_size`, `multiple_of`), pixels of a picture, steps, guidance scale. `memory_bytes` is an
  estimate of what it takes on the device.

  An `:available` model is on the disk. A `:remote` one is downloaded when it is first used. An `:absent` one is not on
  the disk and may not be downloaded. A `:failed` one cannot be used, and `error` says why. A loaded model also has the
  `bytes` of its weights, `parked` (whether they are in main memory instead of on the device), `idle_ms` since its last
  use and `load_ms`, the time of its load.
  """
  @type model :: %{
          id: String.t(),
          name: String.t(),
          description: String.t(),
          aliases: [String.t()],
          tasks: [String.t()],
          pipeline: String.t(),
          source: String.t(),
          revision: String.t() | nil,
          licence: String.t(),
          defaults: %{
            width: pos_integer,
            height: pos_integer,
            steps: pos_integer,
            guidance_scale: float,
            scheduler: String.t() | nil
          },
          limits: %{
            min_size: pos_integer,
            max_size: pos_integer,
            multiple_of: pos_integer,
            max_steps: pos_integer,
            max_pixels: pos_integer,
            max_guidance: float
          },
          memory_bytes: non_neg_integer,
          fallbacks: [String.t()] | nil,
          state: :loaded | :loading | :available | :remote | :absent | :failed,
          error: String.t() | nil,
          bytes: non_neg_integer | nil,
          parked: boolean | nil,
          idle_ms: non_neg_integer | nil,
          load_ms: non_neg_integer | nil
        }

  # How long after a request's deadline its answer may still come, before the queue counts as dead.
  @slack_ms 5_000

  # The options of functions that make no request: of those that answer at once, and of those that may take long.
  @asking [instance: {:atom, __MODULE__, ""}]
  @operation @asking ++ [timeout: {:wait, 3_600_000, ""}]

  # The status of an instance that does not run.
  @down %{
    state: :down,
    error: nil,
    default_model: nil,
    sidecars: [],
    journal: nil,
    queue: %{
      queued: 0,
      running: 0,
      limit: 0,
      bytes: 0,
      max_bytes: 0,
      estimated_start_ms: nil,
      next: []
    }
  }

  @doc group: "Start"
  @doc """
  An instance as a child of a supervisor.

      iex> StarweaveImage.child_spec(name: MyApp.Images).id
      MyApp.Images
  """
  @spec child_spec([Config.option()]) :: Supervisor.child_spec()
  def child_spec(opts) do
    %{
      id: Config.name(opts),
      start: {__MODULE__, :start_link, [opts]},
      type: :supervisor
    }
  end

  @doc group: "Start"
  @doc """
  Starts an instance and links it to the caller. It returns before Python is up: see `await_ready/2` and `status/1`.

  Raises `ArgumentError` on a wrong option.

      iex> {:ok, pid} = StarweaveImage.start_link(name: MyApp.NoImages, enabled: false)
      iex> StarweaveImage.status(instance: MyApp.NoImages).state
      :disabled
      iex> Supervisor.stop(pid)
      :ok
  """
  @spec start_link([Config.option()]) :: Supervisor.on_start()
  defdelegate start_link(opts \\ []), to: StarweaveImage.Supervisor

  @doc group: "Pictures"
  @doc """
  Makes one image and waits for it.

  The work is cancelled if the caller dies or `:timeout` passes. The options are those of a request, above.

  Errors: any kind of `StarweaveImage.Error`.

      {:ok, image} = StarweaveImage.generate("a red apple", seed: 7)
      image.seed #=> 7

      iex> {:error, error} = StarweaveImage.generate("a red apple", steps: 0)
      iex> {error.kind, error.details.field}
      {:invalid_request, :steps}
  """
  @spec generate(String.t(), options) :: {:ok, Image.t()} | {:error, Error.t()}
  def generate(prompt, opts \\ []) do
    with {:ok, [image | _]} <- generate_images(prompt, opts), do: {:ok, image}
  end

  @doc group: "Pictures"
  @doc """
  As `generate/2`, but raises the `StarweaveImage.Error`.

      image = StarweaveImage.generate!("a red apple")

      iex> StarweaveImage.generate!("a red apple", steps: 0)
      ** (StarweaveImage.Error) steps must be an integer from 1 to 200, got 0
  """
  @spec generate!(String.t(), options) :: Image.t()
  def generate!(prompt, opts \\ []) do
    case generate(prompt, opts) do
      {:ok, image} -> image
      {:error, error} -> raise error
    end
  end

  @doc group: "Pictures"
  @doc """
  Makes `n` images (1 to 16) in one request. Image k has the seed `seed + k`, and reports it.

  Errors: as `generate/2`; if one image fails, all do.

      {:ok, images} = StarweaveImage.generate_many("a red apple", 4, seed: 1)
      Enum.map(images, & &1.seed) #=> [1, 2, 3, 4]

      iex> {:error, error} = StarweaveImage.generate_many("a red apple", 0)
      iex> error.message
      "num_images must be an integer from 1 to 16, got 0"
  """
  @spec generate_many(String.t(), pos_integer, options) ::
          {:ok, [Image.t()]} | {:error, Error.t()}
  def generate_many(prompt, n, opts \\ []), do: generate_images(prompt, put(opts, :num_images, n))

  defp generate_images(prompt, opts) do
    with {:ok, request} <- Request.new(prompt, opts),
         {:ok, answer} <-
           call(request.instance, {:generate, request}, request.timeout + @slack_ms),
         do: answer
  end

  @doc group: "Pictures"
  @doc """
  Changes a picture as `prompt` says. `image` is a file's bytes or a `StarweaveImage.Image`, or a list of up to four of
  them for a model that makes one picture of several.

  `:strength` (0 to 1, 0.8 unless given) says how much may change. The result has the size of `image`, within the
  model's limits, unless `:width` and `:height` say otherwise.

  Errors: as `generate/2`. Here an `image` of nil is `:invalid_request`, while the option `image: nil` of `generate/2`
  counts as not given.

      {:ok, apple} = StarweaveImage.generate("a red apple")
      {:ok, pear} = StarweaveImage.edit(apple, "a green pear", strength: 0.7)

      iex> {:error, error} = StarweaveImage.edit(:apple, "a green pear")
      iex> error.message
      "image must be a PNG, JPEG or WebP file of at most 12 MiB, got :apple"
      iex> {:error, error} = StarweaveImage.edit([:apple, :pear], "a still life")
      iex> error.message
      "images must be a list of 1 to 4 PNG, JPEG or WebP files of at most 12 MiB each, got a list"
  """
  @spec edit(binary | Image.t() | [binary | Image.t()], String.t(), options) ::
          {:ok, Image.t()} | {:error, Error.t()}
  def edit(image, prompt, opts \\ [])

  # `length/1` also fails for an improper list, which is then refused as a picture.
  def edit(images, prompt, opts) when length(images) > 0 do
    files = for image <- images, do: with(%Image{data: data} <- image, do: data)
    generate(prompt, put(opts, :images, files))
  end

  def edit(image, prompt, opts) do
    with {:ok, image} <- file(:image, image), do: generate(prompt, put(opts, :image, image))
  end

  @doc group: "Pictures"
  @doc """
  Redraws the part of a picture that is white in `mask`, as `prompt` says. Where the mask is black or transparent, no
  pixel changes.

  `image` and `mask` have the same size in pixels; each is a file's bytes or a `StarweaveImage.Image`. Options and
  errors: as `edit/3`.

      {:ok, house} = StarweaveImage.generate("a house on green hills")
      {:ok, evening} = StarweaveImage.inpaint(house, File.read!("sky.png"), "the sky at sunset", strength: 1.0)

      iex> {:error, error} = StarweaveImage.inpaint(<<0x89, "PNG\\r\\n", 0x1A, "\\n", 0::64>>, "no mask", "a sky")
      iex> error.details.field
      :mask
  """
  @spec inpaint(binary | Image.t(), binary | Image.t(), String.t(), options) ::
          {:ok, Image.t()} | {:error, Error.t()}
  def inpaint(image, mask, prompt, opts \\ []) do
    with {:ok, image} <- file(:image, image),
         {:ok, mask} <- file(:mask, mask),
         do: edit(image, prompt, put(opts, :mask, mask))
  end

  @doc group: "Pictures"
  @doc """
  Makes several pictures of the same thing: four, or `:num_images`. Each has a seed of its own, and reports it.

  Variations of a prompt differ by their seeds. With `:variation_strength` (0 to 1) they stay near the picture of
  `:seed`, which is the first of them: each goes that far from it towards the picture of its own seed. To draw one of
  them again, give the same `:seed` and `:variation_strength`, and its own seed as `:variation_seed`.

  Variations of a picture, a `StarweaveImage.Image` or a file's bytes, start from that picture, and `:strength` says how
  much may change (0.6 unless given). The prompt is that of the image; for a file give `:prompt`. Errors: as `edit/3`.

      {:ok, [one, two]} = StarweaveImage.variations("a red apple", num_images: 2)
      {:ok, nearby} = StarweaveImage.variations(one, strength: 0.3)
      {:ok, [_one_again | alike]} = StarweaveImage.variations("a red apple", seed: one.seed, variation_strength: 0.3)

      iex> {:error, error} = StarweaveImage.variations(<<0x89, "PNG\\r\\n", 0x1A, "\\n", 0::64>>)
      iex> error.message
      "prompt is required"
  """
  @spec variations(String.t() | binary | Image.t(), options) ::
          {:ok, [Image.t()]} | {:error, Error.t()}
  def variations(image_or_prompt, opts \\ []) do
    {prompt, opts} = pop(opts, :prompt)
    opts = put_new(opts, :num_images, 4)

    cond do
      is_struct(image_or_prompt, Image) ->
        vary(image_or_prompt, prompt || image_or_prompt.prompt, opts)

      text?(image_or_prompt) ->
        generate_images(image_or_prompt, opts)

      true ->
        vary(image_or_prompt, prompt, opts)
    end
  end

  # Anything else is taken for a picture, and refused as one: a damaged upload must not become a prompt.
  defp text?(value), do: is_binary(value) and not Type.image?(value) and String.valid?(value)

  defp vary(image, prompt, opts) do
    with {:ok, image} <- file(:image, image),
         do: generate_images(prompt, opts |> put(:image, image) |> put_new(:strength, 0.6))
  end

  # An option of nil counts as not given. A picture of nil does not: it is what a lost upload leaves.
  defp file(name, %Image{data: data}), do: file(name, data)
  defp file(name, data), do: argument(name, :image, data)

  @doc group: "Jobs"
  @doc """
  Submits a request, and returns its id once it is accepted. The request outlives the caller: any process may ask for
  the result with `await/3`, or watch with `subscribe/2`. The result is kept for the instance's `:result_ttl`.

  With `:id` it is idempotent. To submit the same request again under an id that waits, runs or is done joins that
  request. To submit another request under it is `:invalid_request`, with `details.conflict`.

  With `durable: true` it returns when the request is on disk, in the instance's `:journal`. If the BEAM ends before the
  request is done, the next start of the instance continues it; its result outlives the BEAM too.

  Errors, after which nothing is done: `:invalid_request`, `:overloaded`, `:rate_limited`, `:disabled`, `:unavailable`,
  and `:sidecar_crashed` for a request that is quarantined. How an accepted request ends is what `await/3` returns.

      {:ok, id} = StarweaveImage.submit("a red apple", id: "order-17")
      {:ok, image} = StarweaveImage.await(id)

      iex> {:error, error} = StarweaveImage.submit("a red apple", id: "order 17")
      iex> {error.kind, error.details.field}
      {:invalid_request, :id}
  """
  @spec submit(String.t(), options) :: {:ok, id} | {:error, Error.t()}
  def submit(prompt, opts \\ []) do
    with {:ok, request} <- Request.new(prompt, opts),
         # Without a time limit: a caller that gave up would not know that its request is accepted.
         {:ok, answer} <- call(request.instance, {:submit, request, nil, nil}, :infinity),
         do: answer
  end

  @doc group: "Jobs"
  @doc """
  Waits up to `timeout` ms for a submitted request. When that time is over the work goes on.

  Of a request of several images it returns the first; `await_many/3` returns all. What a model gives that is no image
  is a `StarweaveImage.Text` or a `StarweaveImage.Result`. Options: `:instance`.

  Errors: the error that the request ended with; `:timeout` if it has not ended; `:invalid_request` if no request has
  this id, or its result was kept for `:result_ttl` and is gone; `:unavailable` if the instance does not run.

      iex> {:error, error} = StarweaveImage.await("order-17", 1_000, instance: :no_such_instance)
      iex> error.kind
      :unavailable
  """
  @spec await(id, timeout, [instance_option]) :: {:ok, Result.any_kind()} | {:error, Error.t()}
  def await(id, timeout \\ 600_000, opts \\ []) do
    with {:ok, [image | _]} <- await_many(id, timeout, opts), do: {:ok, image}
  end

  @doc group: "Jobs"
  @doc """
  As `await/3`, but returns all images of the request.

      iex> {:error, error} = StarweaveImage.await_many("order 17")
      iex> error.details.field
      :id
  """
  @spec await_many(id, timeout, [instance_option]) ::
          {:ok, [Result.any_kind()]} | {:error, Error.t()}
  def await_many(id, timeout \\ 600_000, opts \\ []) do
    with {:ok, id} <- checked_id(id),
         {:ok, instance} <- instance(opts),
         {:ok, answer} <- call(instance, {:await, id}, timeout),
         do: answer
  end

  @doc group: "Jobs"
  @doc """
  Makes images, as a lazy stream of `t:event/0`. It ends with one `{:image, image}` for each image, or with
  `{:error, error}`. A consumer that leaves the stream early cancels the request, unless another process waits for it
  too.

      for event <- StarweaveImage.stream("a red apple", preview: true) do
        case event do
          {:queued, %{position: n}} -> IO.puts("number \#{n} in the queue")
          {:progress, p} -> IO.puts("\#{p.phase} \#{p.step}/\#{p.steps}")
          {:preview, preview} -> File.write!("apple.preview.jpg", preview.data)
          {:image, image} -> StarweaveImage.Image.save(image, "apple.png")
          {:error, error} -> IO.puts(error.message)
        end
      end

  Previews come only with `preview: true`. An error that `generate/2` returns is an event here:

      iex> [{:error, error}] = Enum.to_list(StarweaveImage.stream(""))
      iex> error.details.field
      :prompt
  """
  @spec stream(String.t(), options) :: Enumerable.t()
  def stream(prompt, opts \\ []) do
    Stream.resource(fn -> open_stream(prompt, opts) end, &next_event/1, &close_stream/1)
  end

  # An alias, not a pid: once it is deactivated, no late event can reach the caller's mailbox.
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

  @doc group: "Jobs"
  @doc """
  Sends the events of a request to the calling process, as messages `{:starweave_image, id, event}` (`t:event/0`).

  The first messages come at once and tell how the request stands: its place in the queue, or the last progress and
  preview of each image, or its images or error. Options: `:instance`.

      iex> StarweaveImage.subscribe("no-such-request")
      {:error, :not_found}
  """
  @spec subscribe(id, [instance_option]) :: :ok | {:error, :not_found | Error.t()}
  def subscribe(id, opts \\ []) do
    with {:ok, id} <- checked_id(id),
         {:ok, instance} <- instance(opts),
         {:ok, answer} <- call(instance, {:subscribe, id, {:process, self()}}),
         do: answer
  end

  @doc group: "Jobs"
  @doc """
  Undoes `subscribe/2`. After it returns, no event of the request is in the mailbox, and none will come. Options:
  `:instance`.

      iex> StarweaveImage.unsubscribe("no-such-request")
      :ok
  """
  @spec unsubscribe(id, [instance_option]) :: :ok | {:error, Error.t()}
  def unsubscribe(id, opts \\ []) do
    with {:ok, id} <- checked_id(id), {:ok, instance} <- instance(opts) do
      answer = call(instance, {:unsubscribe, id, {:process, self()}})
      drop_subscribed(id)
      with {:ok, answer} <- answer, do: answer
    end
  end

  defp drop_subscribed(id) do
    receive do
      {:starweave_image, ^id, _event} -> drop_subscribed(id)
    after
      0 -> :ok
    end
  end

  @doc group: "Jobs"
  @doc """
  Cancels a request: its callers get the error `:cancelled` at once, and the device stops before its next denoise step.
  Options: `:instance`.

      iex> StarweaveImage.cancel("no-such-request")
      {:error, :not_found}
  """
  @spec cancel(id, [instance_option]) :: :ok | {:error, :not_found | :finished | Error.t()}
  def cancel(id, opts \\ []) do
    with {:ok, id} <- checked_id(id),
         {:ok, instance} <- instance(opts),
         {:ok, answer} <- call(instance, {:cancel, id}, :infinity),
         do: answer
  end

  @doc group: "Models"
  @doc """
  The models that the instance knows, each as a `t:model/0`. The list is empty until a sidecar was ready.

  Options: `:instance`. Errors: `:unavailable` if the instance does not run.

      [%{id: "starweave/tiny", state: :loaded} | _] = StarweaveImage.models()

      iex> {:error, error} = StarweaveImage.models(instance: :no_such_instance)
      iex> error.kind
      :unavailable
  """
  @spec models([instance_option]) :: [model] | {:error, Error.t()}
  def models(opts \\ []) do
    with {:ok, instance} <- instance(opts),
         {:ok, models} <- call(instance, :models),
         do: models
  end

  @doc group: "Models"
  @doc """
  Loads a model into every sidecar, and waits until it is loaded; a download is part of that.

  Options: `:timeout` in ms (an hour unless given), after which the load goes on, and `:instance`. Errors:
  `:invalid_request`, `:model_not_found`, `:model_load_failed`, `:out_of_memory`, `:timeout`, `:disabled`,
  `:unavailable`.

      :ok = StarweaveImage.load_model("starweave/tiny")

      iex> {:error, error} = StarweaveImage.load_model("../tiny")
      iex> {error.kind, error.details.field}
      {:invalid_request, :model}
  """
  @spec load_model(String.t(), [waiting_option]) :: :ok | {:error, Error.t()}
  def load_model(id, opts \\ []), do: operation("load_model", id, opts)

  @doc group: "Models"
  @doc """
  Frees the memory of a loaded model.

  Options: `:timeout`, `:instance`. Errors: `:invalid_request` (also if the model is in use), `:model_not_found`,
  `:timeout`, `:disabled`, `:unavailable`.

      :ok = StarweaveImage.unload_model("starweave/tiny")

      iex> {:error, error} = StarweaveImage.unload_model("starweave/tiny", instance: :no_such_instance)
      iex> error.kind
      :unavailable
  """
  @spec unload_model(String.t(), [waiting_option]) :: :ok | {:error, Error.t()}
  def unload_model(id, opts \\ []), do: operation("unload_model", id, opts)

  defp operation(type, id, opts) do
    with {:ok, model} <- argument(:model, :model_id, id),
         {:ok, opts} <- checked(opts, @operation),
         {:ok, answer} <- call(opts.instance, {:operation, type, model}, opts.timeout),
         do: answer
  end

  @doc group: "Health"
  @doc """
  What the instance is doing, as `t:status/0`. Answers within milliseconds, whatever runs. Options: `:instance`.

      %{state: :ready, error: nil, sidecars: [%{device: "cpu"}], queue: %{queued: 0, running: 0}} =
        StarweaveImage.status()

      iex> StarweaveImage.status(instance: :no_such_instance).state
      :down
  """
  @spec status([instance_option]) :: status
  def status(opts \\ []) do
    case opts |> instance() |> right!() |> call(:status) do
      {:ok, status} -> status
      {:error, error} -> %{@down | error: error.message}
    end
  end

  @doc group: "Health"
  @doc """
  Whether a sidecar is up; false while it starts. Options: `:instance`.

  It reads the last known state from a table and asks no process, so it never waits: it may be called where nothing may
  block, as in a LiveView's `mount/3`.

      iex> StarweaveImage.available?(instance: :no_such_instance)
      false
  """
  @spec available?([instance_option]) :: boolean
  def available?(opts \\ []), do: opts |> instance() |> right!() |> Queue.available?()

  @doc group: "Start"
  @doc """
  Waits up to `timeout` ms until a sidecar is up, or until it is known why none can be. It is made for scripts.

  Options: `:instance`. Errors: `:unavailable` with the reason, `:disabled`, `:timeout`.

      :ok = StarweaveImage.await_ready()

      iex> {:error, error} = StarweaveImage.await_ready(1_000, instance: :no_such_instance)
      iex> error.kind
      :unavailable
  """
  @spec await_ready(timeout, [instance_option]) :: :ok | {:error, Error.t()}
  def await_ready(timeout \\ 120_000, opts \\ []) do
    with {:ok, instance} <- instance(opts),
         {:ok, answer} <- call(instance, :await_ready, timeout),
         do: answer
  end

  @doc group: "Sidecars"
  @doc """
  Starts another sidecar, which stays for as long as the instance lives. Returns its index, as in `status/1`.

  Options: `:device :dtype :capacity :memory_budget :ram_budget :offload :compile`, each as the instance has it unless
  given, and `:instance`.

      {:ok, 2} = StarweaveImage.add_sidecar(device: "cuda:1")

      iex> {:error, error} = StarweaveImage.add_sidecar(capacity: 0)
      iex> error.message
      "capacity must be an integer from 1 to 64, got 0"
  """
  @spec add_sidecar(keyword) :: {:ok, pos_integer} | {:error, Error.t()}
  def add_sidecar(opts \\ []) do
    {instance, opts} = pop(opts, :instance)
    instance = instance || __MODULE__

    with {:ok, kind} <- Config.sidecar(opts),
         {:ok, {:ok, index, config}} <- call(instance, {:add_sidecar, kind}),
         :ok <- StarweaveImage.Supervisor.add_sidecar(instance, index, config) do
      {:ok, index}
    else
      {:error, field, message} -> refuse(field, message)
      {:ok, {:error, error}} -> {:error, error}
      {:error, %Error{} = error} -> {:error, error}
      {:error, :not_running} -> {:error, gone(instance)}
      {:error, _reason} -> {:error, Error.new(:internal, "the sidecar could not be started")}
    end
  end

  @doc group: "Sidecars"
  @doc """
  Sends a sidecar no more requests, and returns when those in it are done. `resume_sidecar/2` undoes it.

  Options: `:timeout` in ms (an hour unless given), after which it returns `{:error, :timeout}` and the sidecar still
  gets no requests; `:instance`.

      :ok = StarweaveImage.drain_sidecar(2)

      iex> {:error, error} = StarweaveImage.drain_sidecar(2, instance: :no_such_instance)
      iex> error.kind
      :unavailable
  """
  @spec drain_sidecar(pos_integer, [waiting_option]) ::
          :ok | {:error, :not_found | :timeout | Error.t()}
  def drain_sidecar(index, opts \\ []) do
    with {:ok, index} <- checked_index(index),
         {:ok, opts} <- checked(opts, @operation) do
      case call(opts.instance, {:drain, index}, opts.timeout) do
        {:ok, answer} -> answer
        {:error, %{kind: :timeout}} -> {:error, :timeout}
        {:error, error} -> {:error, error}
      end
    end
  end

  @doc group: "Sidecars"
  @doc """
  Sends requests again to a sidecar that was drained. Options: `:instance`.

      :ok = StarweaveImage.resume_sidecar(2)

      iex> {:error, error} = StarweaveImage.resume_sidecar(2, instance: :no_such_instance)
      iex> error.kind
      :unavailable
  """
  @spec resume_sidecar(pos_integer, [waiting_option]) :: :ok | {:error, :not_found | Error.t()}
  def resume_sidecar(index, opts \\ []) do
    with {:ok, index} <- checked_index(index),
         {:ok, opts} <- checked(opts, @operation),
         {:ok, answer} <- call(opts.instance, {:resume, index}),
         do: answer
  end

  @doc group: "Sidecars"
  @doc """
  Drains a sidecar as `drain_sidecar/2` does, then stops its process for good. Requests that it has not finished within
  `:timeout` ms go to another sidecar.

  Options: `:timeout` (an hour unless given), `:instance`.

      :ok = StarweaveImage.remove_sidecar(2, timeout: 60_000)

      iex> {:error, error} = StarweaveImage.remove_sidecar(2, instance: :no_such_instance)
      iex> error.kind
      :unavailable
  """
  @spec remove_sidecar(pos_integer, [waiting_option]) :: :ok | {:error, :not_found | Error.t()}
  def remove_sidecar(index, opts \\ []) do
    instance = get(opts, :instance) || __MODULE__

    with drained when drained in [:ok, {:error, :timeout}] <- drain_sidecar(index, opts),
         :ok <- StarweaveImage.Supervisor.remove_sidecar(instance, index),
         {:ok, answer} <- call(instance, {:removed, index}) do
      answer
    else
      {:error, :not_running} -> {:error, gone(instance)}
      {:error, reason} -> {:error, reason}
    end
  end

  @doc group: "Start"
  @doc """
  Makes the Python environment, as `mix image.setup` does: the function for a release, which has no Mix.

  The options are those of `StarweaveImage.Environment.setup/1`.

      $ bin/my_app eval "StarweaveImage.setup()"

      iex> {:error, error} = StarweaveImage.setup(torch: :tpu)
      iex> error.details.field
      :torch
  """
  @spec setup(keyword) :: {:ok, map} | {:error, Error.t()}
  defdelegate setup(opts \\ []), to: Environment

  # An answer of the queue is `{:ok, answer}`; a queue that is absent or does not answer is an error.
  defp call(instance, message, timeout \\ @slack_ms) do
    with {:ok, instance} <- argument(:instance, :atom, instance),
         {:ok, timeout} <- argument(:timeout, :wait, timeout),
         do: {:ok, GenServer.call(instance, message, timeout)}
  catch
    :exit, {:timeout, _} ->
      {:error, Error.new(:timeout, "no answer within #{timeout} ms")}

    :exit, {:noproc, _} ->
      {:error, gone(instance)}

    # The queue ended before it answered, by a fault of its own or with its supervisor.
    :exit, _reason ->
      {:error, ended(instance)}
  end

  defp instance(opts) do
    with {:ok, opts} <- checked(opts, @asking), do: {:ok, opts.instance}
  end

  # The name of an instance where its options belong is the likeliest mistake.
  defp checked(name, _schema) when is_atom(name) and name not in [nil, true, false] do
    refuse(nil, "options must be a keyword list or a map, such as [instance: #{inspect(name)}]")
  end

  defp checked(opts, schema), do: opts |> Options.validate(schema) |> refusal()

  defp gone(instance), do: unavailable("no instance named #{inspect(instance)} runs")
  defp ended(instance), do: unavailable("the instance named #{inspect(instance)} ended meanwhile")

  defp unavailable(why),
    do: Error.new(:unavailable, "image generation is not available: #{why}")

  defp checked_id(id), do: argument(:id, :id, id)
  defp checked_index(index), do: argument(:index, {:integer, 1, 1_000_000}, index)

  # A value that is no option, and so has no default.
  defp argument(name, type, value) do
    case Options.check(name, type, value) do
      {:ok, nil} -> refuse(name, "#{name} is required")
      checked -> refusal(checked)
    end
  end

  defp refusal({:error, field, message}), do: refuse(field, message)
  defp refusal({:ok, checked}), do: {:ok, checked}

  # For functions that return no error: a wrong argument there is a mistake in the program.
  defp right!({:ok, checked}), do: checked
  defp right!({:error, error}), do: raise(ArgumentError, error.message)

  defp refuse(field, message),
    do: {:error, Error.new(:invalid_request, message, %{field: field})}

  defp put(opts, key, value) when is_map(opts), do: Map.put(opts, key, value)

  # Options that are no list or map are refused later, with the reason.
  defp put(opts, key, value),
    do: if(Keyword.keyword?(opts), do: Keyword.put(opts, key, value), else: opts)

  defp put_new(opts, key, value),
    do: if(get(opts, key) == nil, do: put(opts, key, value), else: opts)

  defp pop(opts, key) when is_map(opts), do: Map.pop(opts, key)

  defp pop(opts, key),
    do: if(Keyword.keyword?(opts), do: Keyword.pop(opts, key), else: {nil, opts})

  defp get(opts, key) when is_map(opts), do: Map.get(opts, key)
  defp get(opts, key), do: if(Keyword.keyword?(opts), do: opts[key])
end
