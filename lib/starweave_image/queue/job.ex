defmodule StarweaveImage.Queue.Job do
  @moduledoc false
  # The queue's state of one accepted request: who waits for it, its progress, and what its sidecar has sent so far. Its
  # place in the queue or at a sidecar is in `Schedule`.

  alias StarweaveImage.{Error, Image, Result, Schema, Text}
  alias StarweaveImage.Queue.Verdict

  # `serial` distinguishes the job from an earlier one with the same id. `owners` are the processes that wait for it;
  # when all are gone it is cancelled, unless it was also submitted. `status`: `:journaling` until it is on disk,
  # `:open`, `:ending` until its end is on disk, `:finished`. `told` is the last place in the queue that subscribers
  # were told. `ends`: how many times the application ended while the request ran.
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
  # A process, or the alias of a stream. A stream is also told when there are no further events.
  @type subscriber :: {:process, pid} | {:alias, reference}

  @timings ~w(queue load denoise decode encode total)a

  ## Clocks

  @doc "Starts a timer that sends `{:timer, kind, id, serial}` to the calling process in `ms`; none if that is nil."
  @spec start_timer(t, atom, non_neg_integer | nil) :: t
  def start_timer(job, _kind, nil), do: job

  def start_timer(job, kind, ms) do
    message = {:timer, kind, job.request.id, job.serial}
    put_in(job.timers[kind], Process.send_after(self(), message, ms))
  end

  @doc "Stops the job's timer of this kind, and removes its message if that is already in the mailbox."
  @spec stop_timer(t, atom) :: t
  def stop_timer(job, kind) do
    {timer, timers} = Map.pop(job.timers, kind)
    if timer && Process.cancel_timer(timer) == false, do: forget_timer(kind, job)
    %{job | timers: timers}
  end

  # The timer has fired already, and its message would be taken for that of a later timer of the same kind.
  defp forget_timer(kind, %{serial: serial, request: %{id: id}}) do
    receive do
      {:timer, ^kind, ^id, ^serial} -> :ok
    after
      0 -> :ok
    end
  end

  @spec stop_timers(t) :: t
  def stop_timers(job), do: Enum.reduce(Map.keys(job.timers), job, &stop_timer(&2, &1))

  @doc "Whether the request has failed, so that the same id may be requested again."
  @spec failed?(t) :: boolean
  def failed?(%{status: :finished, result: {kind, outcome}}),
    do: kind == :error or {kind, outcome} == {:stored, :error}

  def failed?(_job), do: false

  @doc "The job reduced to its result. The digest that remains recognises the same request when it is made again."
  @spec ended(t) :: t
  def ended(job) do
    request = %{job.request | image: nil, images: nil, mask: nil}
    job = %{job | status: :finished, request: request, owners: [], waiters: [], subscribers: []}
    reset(%{job | submitters: [], cancellers: []})
  end

  ## Attempts

  @doc "An attempt begins at `now`; discards what earlier ones have produced."
  @spec begin(t, integer) :: t
  def begin(job, now) do
    job = %{job | dispatched_at: now, accepted: nil, first_step: nil, loaded_at: nil}
    reset(%{job | told: nil})
  end

  @spec reset(t) :: t
  def reset(job), do: %{job | images: [], progress: %{}, previews: %{}}

  @doc "Counts another retry, after a temporary failure."
  @spec retry(t) :: t
  def retry(job), do: %{job | retries: job.retries + 1}

  @doc "Replaces the job's model because of an error; `rest` are the fallbacks after that one."
  @spec replace_model(t, String.t(), [String.t()], Error.t()) :: t
  def replace_model(job, model, rest, error) do
    named = if job.model, do: "Model #{job.model}", else: "The default model"
    note = "#{named} could not be used (#{error.message}): #{model} drew this instead."
    %{job | model: model, fallbacks: rest, retries: 0, notices: job.notices ++ [note]}
  end

  @doc """
  The error of a job whose timer of this kind has fired; nil if that does not end the job. `deaths` counts the sidecars
  that died while running it.
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

  ## Messages from its sidecar

  @doc "Takes a message of the wire about the running job; returns the event for its subscribers, or nil."
  @spec heard(t, map, pos_integer, integer) :: {t, {:progress | :preview, map} | nil}
  def heard(job, message, attempt, now) do
    case message.t do
      :accepted -> {%{job | accepted: message}, nil}
      :progress -> progress(job, message, attempt, now)
      :preview -> preview(job, message)
      made when made in [:image, :result] -> {%{job | images: [message | job.images]}, nil}
    end
  end

  # Adds the remaining ms, estimated from the progress so far.
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

  @doc "How far the attempt has come at `now`, for `Verdict`."
  @spec point(t, integer) :: Verdict.point()
  def point(%{dispatched_at: sent, loaded_at: nil}, now), do: {now - sent, {:load, now - sent}}
  def point(job, now), do: {now - job.dispatched_at, {:work, now - job.loaded_at}}

  defp preview(job, preview) do
    # Copied, since the data is a part of a larger binary from the port, which would stay in memory with it.
    event = %{Map.drop(preview, [:t, :g]) | data: :binary.copy(preview.data)}
    {%{job | previews: Map.put(job.previews, event.image, event)}, {:preview, event}}
  end

  @doc "The job's result, from the parts received and the `done` message of the wire."
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

  # `done` has the parameters of the first image and the seeds of all; each file gets its own seed.
  defp own_parameters(%{"variation_seed" => _} = parameters, seed),
    do: parameters |> Map.delete("seeds") |> Map.put("variation_seed", seed)

  defp own_parameters(parameters, seed),
    do: parameters |> Map.delete("seeds") |> Map.replace("seed", seed)

  @doc """
  The error of an `error` message of the wire. Unknown kinds and fields are taken to be from a later version.

      iex> message = %{kind: "invalid_request", message: "no", field: "images[1]", retryable: nil}
      iex> StarweaveImage.Queue.Job.error(message).details
      %{field: :images}
  """
  @spec error(map) :: Error.t()
  def error(message) do
    kind = Enum.find(Error.kinds(), :internal, &(Atom.to_string(&1) == message.kind))

    # For a list, the field includes the position, as in "images[1]".
    field = message.field && Schema.name(message.field |> String.split("[") |> hd())
    error = Error.new(kind, message.message, if(field, do: %{field: field}, else: %{}))
    if message.retryable == nil, do: error, else: %{error | retryable?: message.retryable}
  end

  @doc "The size of the job's results in bytes."
  @spec bytes(t) :: non_neg_integer
  def bytes(%{result: {:ok, images}}), do: Enum.sum(Enum.map(images, &byte_size(Result.data(&1))))
  def bytes(_job), do: 0

  ## Waiters and subscribers

  @spec tell(t, {atom, term}) :: :ok
  def tell(job, event), do: Enum.each(job.subscribers, &send_event(&1, job.request.id, event))

  @doc "The latest progress and previews of a running job, as events."
  @spec so_far(t) :: [{:progress | :preview, map}]
  def so_far(job) do
    for({_, event} <- Enum.sort(job.previews), do: {:preview, event}) ++
      for {_, event} <- Enum.sort(job.progress), do: {:progress, event}
  end

  @doc "Sends the result to everyone who waits, and answers those who cancelled the job."
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
