defmodule StarweaveImage.Queue.Job do
  @moduledoc false
  # What the queue knows of one accepted request: who waits for it, how far it has come, and what its sidecar has
  # sent of it. Where it waits or runs, `Schedule` knows.

  alias StarweaveImage.{Error, Image, Result, Schema, Text}
  alias StarweaveImage.Queue.Verdict

  # `serial` tells it from an earlier one of the same id. `owners` are the processes that wait for it; when all are gone
  # it is cancelled, unless it was also submitted. `status`: `:journaling` until it is on disk, `:open`, `:ending` until
  # its end is on disk, `:finished`. `told` is the place that its watchers were told last. `ends`: lives of the
  # application that ended while it ran.
  defstruct [
    :request,
    :serial,
    :deadline,
    :submitted_at,
    :dispatched_at,
    :model,
    :accepted,
    :first_step,
    :loaded_at,
    :result,
    :told,
    status: :open,
    submitted?: false,
    timers: %{},
    owners: [],
    waiters: [],
    subscribers: [],
    submitters: [],
    cancellers: [],
    images: [],
    progress: %{},
    previews: %{},
    notices: [],
    retries: 0,
    ends: 0,
    fallbacks: nil
  ]

  @type t :: %__MODULE__{}
  @type result :: {:ok, [Result.any_kind()]} | {:error, Error.t()}
  # A process, or a stream by its alias, which is also told when no more comes.
  @type subscriber :: {:process, pid} | {:alias, reference}

  @timings ~w(queue load denoise decode encode total)a

  ## Clocks

  @doc "Has `{:timer, kind, id, serial}` sent to the calling process in `ms`; none where that is nil."
  @spec start_timer(t, atom, non_neg_integer | nil) :: t
  def start_timer(job, _kind, nil), do: job

  def start_timer(job, kind, ms) do
    message = {:timer, kind, job.request.id, job.serial}
    put_in(job.timers[kind], Process.send_after(self(), message, ms))
  end

  @doc "Its timer of this kind fires no more, also where its message is already in the mailbox."
  @spec stop_timer(t, atom) :: t
  def stop_timer(job, kind) do
    {timer, timers} = Map.pop(job.timers, kind)
    if timer && Process.cancel_timer(timer) == false, do: forget_timer(kind, job)
    %{job | timers: timers}
  end

  # It has fired already, and its message would be taken for that of a later timer of the same kind.
  defp forget_timer(kind, %{serial: serial, request: %{id: id}}) do
    receive do
      {:timer, ^kind, ^id, ^serial} -> :ok
    after
      0 -> :ok
    end
  end

  @spec stop_timers(t) :: t
  def stop_timers(job), do: Enum.reduce(Map.keys(job.timers), job, &stop_timer(&2, &1))

  @doc "Whether it has ended in a way that lets the same be asked for again."
  @spec failed?(t) :: boolean
  def failed?(%{status: :finished, result: {kind, outcome}}),
    do: kind == :error or {kind, outcome} == {:stored, :error}

  def failed?(_job), do: false

  @doc "It has its result, and is kept for that alone. Who asks for the same again is known by the digest of it."
  @spec ended(t) :: t
  def ended(job) do
    request = %{job.request | image: nil, images: nil, mask: nil}
    job = %{job | status: :finished, request: request, owners: [], waiters: [], subscribers: []}
    reset(%{job | submitters: [], cancellers: []})
  end

  ## Attempts

  @doc "An attempt begins at `now`, or is over: of an earlier one nothing counts."
  @spec begin(t, integer) :: t
  def begin(job, now) do
    job = %{job | dispatched_at: now, accepted: nil, first_step: nil, loaded_at: nil}
    reset(%{job | told: nil})
  end

  @spec reset(t) :: t
  def reset(job), do: %{job | images: [], progress: %{}, previews: %{}}

  @doc "It is tried again after a failure that may pass."
  @spec retry(t) :: t
  def retry(job), do: %{job | retries: job.retries + 1}

  @doc "Another model is to draw it, because of the error; and then the `rest` may."
  @spec replace_model(t, String.t(), [String.t()], Error.t()) :: t
  def replace_model(job, model, rest, error) do
    named = if job.model, do: "Model #{job.model}", else: "The default model"
    note = "#{named} could not be used (#{error.message}): #{model} drew this instead."
    %{job | model: model, fallbacks: rest, retries: 0, notices: job.notices ++ [note]}
  end

  @doc """
  The error of a job whose timer of this kind has fired; nil where that does not end it. `deaths`: of sidecars under
  it.
  """
  @spec timed_out(t, atom, non_neg_integer) :: Error.t() | nil
  def timed_out(%{request: request} = job, kind, deaths) do
    case kind do
      :deadline ->
        Error.new(
          :timeout,
          "the request was not done within its timeout of #{request.timeout} ms#{died(deaths)}"
        )

      :queue when job.dispatched_at == nil ->
        message =
          "the request was not begun within its queue_timeout of #{request.queue_timeout} ms"

        Error.new(:timeout, message)

      :run ->
        message = "an attempt was not done within its run_timeout of #{request.run_timeout} ms"
        Error.new(:timeout, message)

      _ ->
        nil
    end
  end

  defp died(0), do: ""
  defp died(1), do: "; the Python process ended under it once"

  defp died(n),
    do: "; the Python process ended under it #{n} times, which is not shown to be its own doing"

  ## What its sidecar sends

  @doc "What a message of the wire says of it while it runs, and the event that tells of that, where one does."
  @spec heard(t, map, pos_integer, integer) :: {t, {:progress | :preview, map} | nil}
  def heard(job, message, attempt, now) do
    case message.t do
      :accepted -> {%{job | accepted: message}, nil}
      :progress -> progress(job, message, attempt, now)
      :preview -> preview(job, message)
      made when made in [:image, :result] -> {%{job | images: [message | job.images]}, nil}
    end
  end

  # With the ms that are left, by what went before.
  defp progress(job, progress, attempt, now) do
    num_images = job.request.num_images
    done = progress.image * progress.steps + progress.step

    job =
      if job.first_step == nil and progress.phase == :denoising and progress.step > 0,
        do: %{job | first_step: {done, now}},
        else: job

    loaded? = job.loaded_at == nil and progress.phase != :loading
    job = if loaded?, do: %{job | loaded_at: now}, else: job

    eta =
      with {first, at} when done > first <- job.first_step,
           left = num_images * progress.steps - done,
           do: div((now - at) * left, done - first),
           else: (_ -> nil)

    event =
      progress
      |> Map.take([:phase, :image, :step, :steps, :elapsed_ms])
      |> Map.merge(%{num_images: num_images, eta_ms: eta, attempt: attempt})

    {%{job | progress: Map.put(job.progress, event.image, event)}, {:progress, event}}
  end

  @doc "How far an attempt has come at `now`, for `Verdict`."
  @spec point(t, integer) :: Verdict.point()
  def point(%{dispatched_at: sent, loaded_at: nil}, now), do: {now - sent, {:load, now - sent}}
  def point(job, now), do: {now - job.dispatched_at, {:work, now - job.loaded_at}}

  defp preview(job, preview) do
    # A copy, or whoever keeps it would keep all that was read from the port with it.
    event = %{Map.drop(preview, [:t, :g]) | data: :binary.copy(preview.data)}
    {%{job | previews: Map.put(job.previews, event.image, event)}, {:preview, event}}
  end

  @doc "Its results, with the `done` message of the wire."
  @spec result(t, map, pos_integer) :: result
  def result(%{accepted: nil}, _done, _attempts), do: incomplete("the answer was not complete")

  def result(job, done, attempts) do
    if length(job.images) == job.request.num_images do
      parts = Enum.sort_by(job.images, & &1.index)
      {:ok, Enum.map(parts, &made(&1, job, done, attempts))}
    else
      incomplete("a result is missing")
    end
  end

  defp incomplete(message), do: {:error, Error.new(:internal, message)}

  defp made(part, job, done, attempts) do
    timings =
      for name <- @timings, value = (done.timings || %{})[Atom.to_string(name)], into: %{} do
        {name, value}
      end

    common = %{
      id: job.request.id,
      index: part.index,
      sha256: part.sha256,
      model: done.model || job.accepted.model,
      prompt: job.request.prompt,
      seed: part.seed,
      parameters: own_parameters(done.parameters || %{}, part.seed),
      timings: Map.put(timings, :queue, job.dispatched_at - job.submitted_at),
      notices: job.notices ++ (done.notices || []),
      attempts: attempts
    }

    made(part, job, common)
  end

  defp made(%{t: :image} = part, job, common) do
    part
    |> Map.take([:data, :format, :width, :height])
    |> Map.merge(Map.take(job.accepted, [:steps, :guidance_scale, :scheduler]))
    |> Map.put(:negative_prompt, job.request.negative_prompt)
    |> Map.merge(common)
    |> then(&struct!(Image, &1))
  end

  defp made(%{kind: :text} = part, _job, common),
    do: struct!(Text, Map.merge(common, %{text: part.data, facts: part.facts}))

  defp made(part, _job, common) do
    own = Map.take(part, [:data, :kind, :media_type, :facts])
    struct!(Result, Map.merge(common, own))
  end

  # `done` has those of the first image, and the seeds of all; each file has its own.
  defp own_parameters(%{"variation_seed" => _} = parameters, seed),
    do: parameters |> Map.delete("seeds") |> Map.put("variation_seed", seed)

  defp own_parameters(parameters, seed),
    do: parameters |> Map.delete("seeds") |> Map.replace("seed", seed)

  @doc """
  The error of an `error` message of the wire. Kinds and fields that are not known here are those of a later version.

      iex> message = %{kind: "invalid_request", message: "no", field: "images[1]", retryable: nil}
      iex> StarweaveImage.Queue.Job.error(message).details
      %{field: :images}
  """
  @spec error(map) :: Error.t()
  def error(message) do
    kind = Enum.find(Error.kinds(), :internal, &(Atom.to_string(&1) == message.kind))

    # Of a list it names the place, such as "images[1]".
    field = message.field && Schema.name(message.field |> String.split("[") |> hd())
    error = Error.new(kind, message.message, if(field, do: %{field: field}, else: %{}))
    if message.retryable == nil, do: error, else: %{error | retryable?: message.retryable}
  end

  @doc "Bytes of its results."
  @spec bytes(t) :: non_neg_integer
  def bytes(%{result: {:ok, images}}), do: Enum.sum(Enum.map(images, &byte_size(Result.data(&1))))
  def bytes(_job), do: 0

  ## Who waits for it

  @spec tell(t, {atom, term}) :: :ok
  def tell(job, event), do: Enum.each(job.subscribers, &send_event(&1, job.request.id, event))

  @doc "The events that say how one that runs stands."
  @spec so_far(t) :: [{:progress | :preview, map}]
  def so_far(job) do
    for({_, event} <- Enum.sort(job.previews), do: {:preview, event}) ++
      for {_, event} <- Enum.sort(job.progress), do: {:progress, event}
  end

  @doc "Gives everybody who waits the result. Whoever cancelled it is answered too."
  @spec deliver(t, result) :: :ok
  def deliver(job, result) do
    Enum.each(job.waiters, &GenServer.reply(&1, result))
    Enum.each(job.cancellers, &GenServer.reply(&1, :ok))
    Enum.each(final_events(result), &tell(job, &1))
    for {:alias, reference} <- job.subscribers, do: send(reference, {reference, :end})
    :ok
  end

  defp final_events({:ok, images}), do: Enum.map(images, &final_event/1)
  defp final_events({:error, error}), do: [{:error, error}]

  defp final_event(%Image{} = image), do: {:image, image}
  defp final_event(result), do: {:result, result}

  defp send_event({:process, pid}, id, event), do: send(pid, {:starweave_image, id, event})
  defp send_event({:alias, reference}, _id, event), do: send(reference, {reference, event})
end
