defmodule StarweaveImage.Queue do
  @moduledoc false
  # Owns every accepted request until it has its one answer. Sidecars come and go; a request that was
  # running on one that died goes back to its place and is sent again, with the same seed.
  #
  # It only correlates: validation is done in the caller, msgpack in the sidecar's owner.

  use GenServer
  require Logger

  alias StarweaveImage.{Error, Image, Request, Sidecar, Telemetry}

  defmodule Job do
    @moduledoc false
    # `key` orders the waiting requests: priority, then age. A replay keeps its key. `owners` are the
    # processes that wait for it; when all are gone it is cancelled, unless it was also submitted.
    defstruct [
      :request,
      :key,
      :deadline,
      :timer,
      :submitted_at,
      :dispatched_at,
      :sidecar,
      :accepted,
      :first_step,
      :result,
      status: :queued,
      submitted?: false,
      owners: [],
      attempts: 0,
      images: [],
      waiters: [],
      subscribers: []
    ]
  end

  defstruct [
    :config,
    jobs: %{},
    waiting: :gb_sets.new(),
    bytes: 0,
    sequence: 0,
    sidecars: %{},
    operations: %{},
    finished: :queue.new(),
    awaiting_start: [],
    mean_ms: 1_000
  ]

  @ranks %{interactive: 0, normal: 1, background: 2}
  @timings ~w(queue load denoise decode encode total)a

  def start_link(config), do: GenServer.start_link(__MODULE__, config, name: config[:name])

  @impl true
  def init(config) do
    # So that `terminate/2` runs: whoever waits gets an answer also when the instance stops.
    Process.flag(:trap_exit, true)
    {:ok, %__MODULE__{config: config}}
  end

  @impl true
  def terminate(_reason, state), do: fail_all(state, "its instance stops")

  ## Calls

  @impl true
  def handle_call({:generate, request}, {pid, _} = from, state) do
    case admit(state, request, pid) do
      {:ok, state} -> {:noreply, state |> await(request.id, from) |> dispatch()}
      {:error, error} -> {:reply, {:error, error}, state}
    end
  end

  def handle_call({:submit, request, owner, subscriber}, _from, state) do
    case admit(state, request, owner) do
      {:ok, state} ->
        state = if subscriber, do: subscribe(state, request.id, subscriber), else: state
        {:reply, {:ok, request.id}, dispatch(state)}

      {:error, error} ->
        {:reply, {:error, error}, state}
    end
  end

  def handle_call({:await, id}, from, state) do
    case state.jobs do
      %{^id => _} -> {:noreply, await(state, id, from)}
      _ -> {:reply, {:error, unknown_id()}, state}
    end
  end

  def handle_call({:subscribe, id, subscriber}, _from, state) do
    if Map.has_key?(state.jobs, id),
      do: {:reply, :ok, subscribe(state, id, subscriber)},
      else: {:reply, {:error, :not_found}, state}
  end

  def handle_call({:unsubscribe, id, subscriber}, _from, state) do
    {:reply, :ok, update_job(state, id, &%{&1 | subscribers: &1.subscribers -- [subscriber]})}
  end

  def handle_call({:leave, id, owner}, _from, state),
    do: {:reply, :ok, state |> leave(id, owner) |> dispatch()}

  def handle_call({:cancel, id}, _from, state) do
    case state.jobs do
      %{^id => %{status: :finished}} -> {:reply, {:error, :finished}, state}
      %{^id => _} -> {:reply, :ok, state |> abandon(id, cancelled()) |> dispatch()}
      _ -> {:reply, {:error, :not_found}, state}
    end
  end

  def handle_call(:status, _from, state), do: {:reply, status(state), state}

  def handle_call(:await_ready, from, state),
    do: {:noreply, settle(%{state | awaiting_start: [from | state.awaiting_start]})}

  def handle_call(:models, _from, state) do
    {:reply, models(state), state}
  end

  def handle_call({:operation, type, model}, from, state) do
    case state_of(state) do
      closed when closed in [:disabled, :down] ->
        {:reply, {:error, closed_error(state, closed)}, state}

      _open ->
        id = "#{type}-#{System.unique_integer([:positive])}"

        operation = %{
          from: from,
          message: %{t: type, id: id, model: model},
          left: nil,
          error: nil
        }

        {:noreply, start_operations(put_in(state.operations[id], operation))}
    end
  end

  ## What the sidecars say

  @impl true
  def handle_cast({:sidecar, pid, index, generation, event}, state) do
    state = known_sidecar(state, index, pid, generation)
    {:noreply, state |> sidecar_event(index, event) |> settle() |> dispatch()}
  end

  @impl true
  def handle_info({:DOWN, monitor, :process, pid, _reason}, state) do
    case Enum.find(state.sidecars, fn {_, sidecar} -> sidecar.monitor == monitor end) do
      {index, _} ->
        {:noreply, state |> sidecar_gone(index) |> dispatch()}

      nil ->
        ids = for {id, %{owners: owners}} <- state.jobs, {pid, monitor} in owners, do: id
        {:noreply, ids |> Enum.reduce(state, &leave(&2, &1, pid)) |> dispatch()}
    end
  end

  def handle_info({:deadline, id}, state) do
    case state.jobs do
      %{^id => %{status: status, request: request}} when status != :finished ->
        {:noreply, state |> abandon(id, timed_out(request)) |> dispatch()}

      _ ->
        {:noreply, state}
    end
  end

  def handle_info({:forget, id, key}, state) do
    case state.jobs do
      %{^id => %{status: :finished, key: ^key}} -> {:noreply, forget(state, id)}
      _ -> {:noreply, state}
    end
  end

  def handle_info(_message, state), do: {:noreply, state}

  ## Admission

  # A known id is the same request asked for again, not a second one; but what failed may be tried again.
  defp admit(%{jobs: jobs} = state, %{id: id} = request, owner) when is_map_key(jobs, id) do
    case jobs[id] do
      %{result: {:error, _}} -> state |> forget(id) |> admit(request, owner)
      job -> {:ok, put_in(state.jobs[id], join(job, owner))}
    end
  end

  defp admit(state, request, owner) do
    config = state.config
    bytes = Request.bytes(request)
    queued = :gb_sets.size(state.waiting)

    cond do
      (closed = state_of(state)) in [:disabled, :down] ->
        {:error, closed_error(state, closed)}

      queued >= config[:max_queue] or state.bytes + bytes > config[:max_queue_bytes] ->
        Telemetry.execute([:queue, :rejected], %{queued: queued, bytes: state.bytes}, %{
          instance: config[:name],
          id: request.id,
          kind: :overloaded
        })

        {:error, overloaded(state, queued)}

      true ->
        {:ok, enqueue(state, request, owner, bytes)}
    end
  end

  defp enqueue(state, request, owner, bytes) do
    now = now()

    job = %Job{
      submitted?: owner == nil,
      owners: if(owner, do: [{owner, Process.monitor(owner)}], else: []),
      request: request,
      key: {@ranks[request.priority], state.sequence, request.id},
      submitted_at: now,
      deadline: now + request.timeout,
      timer: Process.send_after(self(), {:deadline, request.id}, request.timeout)
    }

    Telemetry.execute([:request, :start], %{system_time: System.system_time()}, %{
      instance: state.config[:name],
      id: request.id,
      model: request.model,
      user_id: request.user_id,
      priority: request.priority
    })

    %{
      state
      | jobs: Map.put(state.jobs, request.id, job),
        waiting: :gb_sets.add(job.key, state.waiting),
        bytes: state.bytes + bytes,
        sequence: state.sequence + 1
    }
  end

  defp join(%{status: :finished} = job, _owner), do: job
  defp join(job, nil), do: %{job | submitted?: true}
  defp join(job, owner), do: %{job | owners: [{owner, Process.monitor(owner)} | job.owners]}

  defp leave(state, id, owner) do
    with %{^id => %{owners: owners} = job} <- state.jobs,
         {{_, monitor}, owners} <- List.keytake(owners, owner, 0) do
      Process.demonitor(monitor, [:flush])
      state = put_in(state.jobs[id], %{job | owners: owners})
      if owners == [] and not job.submitted?, do: abandon(state, id, cancelled()), else: state
    else
      _not_its_owner -> state
    end
  end

  defp overloaded(state, queued) do
    capacity = Enum.sum(for {_, s} <- state.sidecars, do: s.capacity)
    wait = div(state.mean_ms * (queued + 1), max(capacity, 1))

    Error.new(:overloaded, "the queue is full (#{queued} requests wait): try again later", %{
      retry_after_ms: max(wait, 100)
    })
  end

  ## Dispatch

  defp dispatch(state) do
    with false <- :gb_sets.is_empty(state.waiting),
         {{_, _, id}, waiting} = :gb_sets.take_smallest(state.waiting),
         job = state.jobs[id],
         {index, sidecar} <- freest(state, job) do
      state = %{state | waiting: waiting}
      left = job.deadline - now()

      if left <= 0 do
        state |> finish(id, {:error, timed_out(job.request)}) |> dispatch()
      else
        # Counted before it is sent: a request that kills its sidecar must not be free.
        job = %{
          job
          | status: :running,
            attempts: job.attempts + 1,
            dispatched_at: now(),
            sidecar: index,
            accepted: nil,
            first_step: nil,
            images: []
        }

        message = Request.to_wire(job.request, left)
        send_to(sidecar, Map.put(message, :t, "generate"))

        state
        |> put_in([Access.key(:jobs), id], job)
        |> put_in([Access.key(:sidecars), index, :running], MapSet.put(sidecar.running, id))
        |> dispatch()
      end
    else
      _nothing_to_send_or_nowhere -> state
    end
  end

  defp freest(state, job) do
    state.sidecars
    |> Enum.filter(fn {_, s} -> s.ready && room?(state, s, job) end)
    |> Enum.max_by(fn {_, s} -> s.capacity - MapSet.size(s.running) end, fn -> nil end)
  end

  # The last of several attempts runs alone: nobody is given up for a crash that another one caused.
  # And the slot of an id that was cancelled is not free for the same id before the sidecar says so.
  defp room?(state, sidecar, job) do
    limit = if last_attempt?(state, job.attempts + 1), do: 1, else: sidecar.capacity

    MapSet.size(sidecar.running) < limit and
      not MapSet.member?(sidecar.running, job.request.id) and
      not Enum.any?(sidecar.running, &last_attempt?(state, attempts(state, &1)))
  end

  defp last_attempt?(state, attempt), do: attempt > 1 and attempt >= state.config[:max_attempts]

  defp attempts(%{jobs: jobs}, id), do: if(job = jobs[id], do: job.attempts, else: 0)

  defp send_to(sidecar, message) do
    message = Map.put(message, :g, sidecar.generation)
    Sidecar.send_message(sidecar.pid, sidecar.generation, message)
  end

  ## Events of a sidecar

  defp known_sidecar(state, index, pid, generation) do
    case state.sidecars do
      %{^index => %{pid: ^pid} = sidecar} ->
        put_in(state.sidecars[index], %{sidecar | generation: generation})

      # The new owner may be heard before the end of the old one is.
      %{^index => _} ->
        state |> sidecar_gone(index) |> known_sidecar(index, pid, generation)

      _ ->
        put_in(state.sidecars[index], %{
          index: index,
          pid: pid,
          monitor: Process.monitor(pid),
          generation: generation,
          state: :starting,
          os_pid: nil,
          uptime_ms: 0,
          ready: nil,
          catalog: nil,
          capacity: 0,
          heartbeat: nil,
          running: MapSet.new(),
          error: nil
        })
    end
  end

  defp sidecar_gone(state, index) do
    Process.demonitor(state.sidecars[index].monitor, [:flush])
    state = sidecar_event(state, index, {:ended, :starting, "its owner process crashed"})
    %{state | sidecars: Map.delete(state.sidecars, index)}
  end

  defp sidecar_event(state, index, {:state, seen}) do
    capacity = if seen.heartbeat && seen.heartbeat.capacity, do: seen.heartbeat.capacity

    update_in(state.sidecars[index], fn sidecar ->
      sidecar = Map.merge(sidecar, seen)
      if sidecar.ready && capacity, do: %{sidecar | capacity: capacity}, else: sidecar
    end)
  end

  defp sidecar_event(state, index, {:ready, ready}) do
    state
    |> update_in([Access.key(:sidecars), index], fn sidecar ->
      %{
        sidecar
        | state: :ready,
          ready: Map.take(ready, [:device, :device_name, :dtype, :versions, :default_model]),
          catalog: ready.catalog,
          capacity: ready.capacity,
          error: nil
      }
    end)
    |> start_operations()
  end

  defp sidecar_event(state, index, {:ended, phase, sentence}) do
    sidecar = state.sidecars[index]

    state =
      put_in(state.sidecars[index], %{
        sidecar
        | state: phase,
          ready: nil,
          heartbeat: nil,
          os_pid: nil,
          capacity: 0,
          running: MapSet.new(),
          error: sentence
      })

    state = Enum.reduce(sidecar.running, state, &replay(&2, index, &1, sentence))
    state = Enum.reduce(state.operations, state, &operation_lost(&2, &1, index, sentence))
    if state_of(state) == :down, do: fail_all(state, down_reason(state)), else: state
  end

  defp sidecar_event(state, index, {:message, %{t: :accepted, id: id} = accepted}) do
    if job = running(state, index, id),
      do: put_in(state.jobs[id], %{job | accepted: accepted}),
      else: state
  end

  defp sidecar_event(state, index, {:message, %{t: :progress, id: id} = progress}) do
    case running(state, index, id) do
      %Job{} = job ->
        {job, event} = progressed(job, progress)

        Telemetry.execute([:request, :progress], Map.take(event, [:step, :steps]), %{
          instance: state.config[:name],
          id: id,
          phase: event.phase,
          image: event.image
        })

        tell(job, {:progress, event})
        put_in(state.jobs[id], job)

      nil ->
        state
    end
  end

  defp sidecar_event(state, index, {:message, %{t: :preview, id: id} = preview}) do
    # Told and not kept. A copy, or whoever keeps it would keep all that was read from the port with it.
    if job = running(state, index, id) do
      event = %{Map.drop(preview, [:t, :g]) | data: :binary.copy(preview.data)}
      tell(job, {:preview, event})
    end

    state
  end

  defp sidecar_event(state, index, {:message, %{t: :image, id: id} = image}) do
    if job = running(state, index, id),
      do: put_in(state.jobs[id], %{job | images: [image | job.images]}),
      else: state
  end

  defp sidecar_event(state, _index, {:message, %{t: :models, models: models}}) do
    # Every sidecar has the same catalog; the last word on what is loaded wins.
    update_in(
      state.sidecars,
      &Map.new(&1, fn {i, s} -> {i, if(s.ready, do: %{s | catalog: models}, else: s)} end)
    )
  end

  defp sidecar_event(state, index, {:message, %{t: :done, id: id} = done}) do
    cond do
      is_map_key(state.operations, id) -> operation_done(state, id, index, nil)
      slot?(state, index, id) -> state |> finish_done(index, id, done) |> slot_free(index, id)
      true -> stray(state, id)
    end
  end

  defp sidecar_event(state, index, {:message, %{t: :error, id: id} = error}) do
    cond do
      is_map_key(state.operations, id) ->
        operation_done(state, id, index, wire_error(error))

      slot?(state, index, id) ->
        state = slot_free(state, index, id)
        job = running(state, index, id)

        cond do
          job == nil -> state
          error.kind == "overloaded" and more?(state, job) -> replay(state, index, id, "")
          true -> finish(state, id, {:error, wire_error(error)})
        end

      true ->
        stray(state, id)
    end
  end

  # A request may have ended on our side, and its id be in use again, while its slot is still taken.
  defp slot?(state, index, id), do: MapSet.member?(state.sidecars[index].running, id)

  defp running(state, index, id) do
    case state.jobs do
      %{^id => %{status: :running, sidecar: ^index} = job} -> job
      _ -> nil
    end
  end

  # A second answer, or one to a question that was never asked.
  defp stray(state, id) do
    Logger.debug("a sidecar answered for #{inspect(id)}, which is not running there")
    state
  end

  defp slot_free(state, index, id),
    do: update_in(state.sidecars[index].running, &MapSet.delete(&1, id))

  defp progressed(job, progress) do
    num_images = job.request.num_images
    done = progress.image * progress.steps + progress.step
    now = now()

    job =
      if job.first_step == nil and progress.phase == :denoising and progress.step > 0,
        do: %{job | first_step: {done, now}},
        else: job

    eta =
      with {first, at} when done > first <- job.first_step,
           left = num_images * progress.steps - done,
           do: div((now - at) * left, done - first),
           else: (_ -> nil)

    event =
      progress
      |> Map.take([:phase, :image, :step, :steps, :elapsed_ms])
      |> Map.merge(%{num_images: num_images, eta_ms: eta, attempt: job.attempts})

    {job, event}
  end

  ## The end of a request

  defp finish_done(state, index, id, done) do
    case running(state, index, id) do
      nil ->
        state

      %{accepted: nil} ->
        finish(state, id, {:error, Error.new(:internal, "the answer was not complete")})

      job ->
        images = job.images |> Enum.sort_by(& &1.index) |> Enum.map(&image(&1, job, done))

        if length(images) == job.request.num_images,
          do: finish(state, id, {:ok, images}),
          else: finish(state, id, {:error, Error.new(:internal, "an image is missing")})
    end
  end

  defp image(part, job, done) do
    timings =
      for name <- @timings, value = (done.timings || %{})[Atom.to_string(name)], into: %{} do
        {name, value}
      end

    %Image{
      id: job.request.id,
      index: part.index,
      data: part.data,
      format: part.format,
      width: part.width,
      height: part.height,
      sha256: part.sha256,
      model: done.model || job.accepted.model,
      prompt: job.request.prompt,
      negative_prompt: job.request.negative_prompt,
      seed: part.seed,
      steps: job.accepted.steps,
      guidance_scale: job.accepted.guidance_scale,
      scheduler: job.accepted.scheduler,
      parameters: done.parameters || %{},
      timings: Map.put(timings, :queue, job.dispatched_at - job.submitted_at),
      notices: done.notices || [],
      attempts: job.attempts
    }
  end

  # Ends a request on our side at once. If it runs, its slot stays taken until the sidecar confirms.
  defp abandon(state, id, error) do
    job = state.jobs[id]

    if job.status == :running do
      sidecar = state.sidecars[job.sidecar]
      if MapSet.member?(sidecar.running, id), do: send_to(sidecar, %{t: "cancel", id: id})
    end

    finish(state, id, {:error, error})
  end

  defp finish(state, id, result) do
    case state.jobs do
      %{^id => %{status: status} = job} when status != :finished ->
        _ = Process.cancel_timer(job.timer)
        for {_pid, monitor} <- job.owners, do: Process.demonitor(monitor, [:flush])
        # First, so that whoever has the answer finds the event already emitted.
        measure(state, job, result)
        deliver(job, result)

        %{
          state
          | waiting: :gb_sets.del_element(job.key, state.waiting),
            bytes: state.bytes - Request.bytes(job.request),
            mean_ms: mean_ms(state, job, result)
        }
        |> keep(id, %{job | owners: []}, result)

      _ ->
        state
    end
  end

  defp deliver(job, result) do
    Enum.each(job.waiters, &GenServer.reply(&1, result))
    Enum.each(final_events(result), &tell(job, &1))
    tell_end(job.subscribers)
  end

  defp final_events({:ok, images}), do: Enum.map(images, &{:image, &1})
  defp final_events({:error, error}), do: [{:error, error}]

  # An owned request was answered to its owner. A submitted one is kept for whoever comes to ask:
  # for a while, and never more than so many.
  defp keep(state, id, %{submitted?: false}, _result),
    do: %{state | jobs: Map.delete(state.jobs, id)}

  defp keep(state, id, job, result) do
    # With its key, which a later request of the same id does not have.
    Process.send_after(self(), {:forget, id, job.key}, state.config[:result_ttl])
    job = %{job | status: :finished, result: result, waiters: [], subscribers: [], images: []}
    finished = :queue.in(id, state.finished)
    state = put_in(state.jobs[id], job)

    if :queue.len(finished) > state.config[:max_results] do
      {{:value, oldest}, finished} = :queue.out(finished)
      %{state | jobs: Map.delete(state.jobs, oldest), finished: finished}
    else
      %{state | finished: finished}
    end
  end

  defp forget(state, id) do
    finished = :queue.delete(id, state.finished)
    %{state | jobs: Map.delete(state.jobs, id), finished: finished}
  end

  defp measure(state, job, result) do
    {images, outcome} =
      case result do
        {:ok, images} -> {images, :ok}
        {:error, error} -> {[], error.kind}
      end

    waited = (job.dispatched_at || now()) - job.submitted_at

    Telemetry.execute(
      [:request, :stop],
      %{
        duration: native(now() - job.submitted_at),
        queue_duration: native(waited),
        bytes: Enum.sum(Enum.map(images, &byte_size(&1.data))),
        images: length(images)
      },
      %{
        instance: state.config[:name],
        id: job.request.id,
        model: (job.accepted && job.accepted.model) || job.request.model,
        result: outcome,
        attempts: job.attempts
      }
    )
  end

  defp mean_ms(state, job, {:ok, _}), do: div(state.mean_ms * 4 + now() - job.dispatched_at, 5)
  defp mean_ms(state, _job, {:error, _}), do: state.mean_ms

  # The sidecar is gone under it. The same seed goes out again: it was drawn before the first attempt.
  defp replay(state, index, id, reason) do
    case running(state, index, id) do
      %Job{} = job ->
        if more?(state, job) do
          job = %{job | status: :queued, sidecar: nil, images: []}
          state = %{state | waiting: :gb_sets.add(job.key, state.waiting)}
          tell(job, {:queued, %{position: position(state, job), attempt: job.attempts + 1}})
          put_in(state.jobs[id], job)
        else
          message = "the Python process ended under this request #{job.attempts} times: #{reason}"
          finish(state, id, {:error, Error.new(:sidecar_crashed, message)})
        end

      nil ->
        state
    end
  end

  defp more?(state, job), do: job.attempts < state.config[:max_attempts]

  defp fail_all(state, reason) do
    error = unavailable(reason)
    ids = for {id, %{status: status}} <- state.jobs, status != :finished, do: id
    Enum.reduce(ids, state, &finish(&2, &1, {:error, error}))
  end

  ## Waiters and subscribers

  defp await(state, id, from) do
    update_job(state, id, fn
      %{status: :finished} = job ->
        GenServer.reply(from, job.result)
        job

      job ->
        %{job | waiters: [from | job.waiters]}
    end)
  end

  # A subscriber is `{:process, pid}` or, for a stream, `{:alias, reference}`.
  defp subscribe(state, id, subscriber) do
    update_job(state, id, fn
      %{status: :finished} = job ->
        Enum.each(final_events(job.result), &tell_one(subscriber, id, &1))
        tell_end([subscriber])
        job

      job ->
        if job.status == :queued do
          event = {:queued, %{position: position(state, job), attempt: job.attempts + 1}}
          tell_one(subscriber, id, event)
        end

        %{job | subscribers: Enum.uniq([subscriber | job.subscribers])}
    end)
  end

  defp tell(job, event), do: Enum.each(job.subscribers, &tell_one(&1, job.request.id, event))

  defp tell_one({:process, pid}, id, event), do: send(pid, {:starweave_image, id, event})
  defp tell_one({:alias, reference}, _id, event), do: send(reference, {reference, event})

  defp tell_end(subscribers),
    do: for({:alias, reference} <- subscribers, do: send(reference, {reference, :end}))

  defp position(state, job),
    do: :gb_sets.fold(&if(&1 <= job.key, do: &2 + 1, else: &2), 0, state.waiting)

  defp update_job(state, id, fun) do
    case state.jobs do
      %{^id => job} -> put_in(state.jobs[id], fun.(job))
      _ -> state
    end
  end

  ## Operations on models: sent to every sidecar that is ready, answered when all have answered

  defp start_operations(state) do
    ready = for {index, %{ready: ready}} <- state.sidecars, ready, do: index

    operations =
      Map.new(state.operations, fn
        {id, %{left: nil} = operation} when ready != [] ->
          Enum.each(ready, &send_to(state.sidecars[&1], operation.message))
          {id, %{operation | left: MapSet.new(ready)}}

        other ->
          other
      end)

    %{state | operations: operations}
  end

  defp operation_done(state, id, index, error) do
    operation = state.operations[id]
    left = MapSet.delete(operation.left || MapSet.new(), index)
    error = operation.error || error

    if MapSet.size(left) == 0 do
      GenServer.reply(operation.from, if(error, do: {:error, error}, else: :ok))
      %{state | operations: Map.delete(state.operations, id)}
    else
      put_in(state.operations[id], %{operation | left: left, error: error})
    end
  end

  defp operation_lost(state, {id, %{left: left}}, index, sentence) do
    waits? = left == nil and state_of(state) == :down

    if waits? or (left != nil and MapSet.member?(left, index)),
      do: operation_done(state, id, index, Error.new(:unavailable, sentence)),
      else: state
  end

  ## Status

  # Of a sidecar that is up, or else what is left of the last word of one that was: nothing is loaded there any more.
  defp models(state) do
    {up, down} = state |> sorted_sidecars() |> Enum.split_with(& &1.ready)

    Enum.find_value(up, & &1.catalog) ||
      for card <- Enum.find_value(down, [], & &1.catalog) do
        if card.state in [:loaded, :loading], do: %{card | state: :available}, else: card
      end
  end

  defp status(state) do
    sidecars = sorted_sidecars(state)

    %{
      state: state_of(state),
      error: Enum.find_value(sidecars, & &1.error),
      default_model: state.config[:default_model],
      sidecars: Enum.map(sidecars, &sidecar_status/1),
      queue: %{
        queued: :gb_sets.size(state.waiting),
        running: Enum.sum(Enum.map(sidecars, &MapSet.size(&1.running))),
        limit: state.config[:max_queue],
        bytes: state.bytes,
        max_bytes: state.config[:max_queue_bytes]
      }
    }
  end

  defp sidecar_status(sidecar) do
    beat = sidecar.heartbeat || %{}

    %{
      index: sidecar.index,
      state: phase(sidecar),
      generation: sidecar.generation,
      os_pid: sidecar.os_pid,
      uptime_ms: sidecar.uptime_ms,
      device: sidecar.ready && sidecar.ready.device,
      device_name: sidecar.ready && sidecar.ready.device_name,
      dtype: sidecar.ready && sidecar.ready.dtype,
      versions: (sidecar.ready && sidecar.ready.versions) || %{},
      capacity: sidecar.capacity,
      running: MapSet.to_list(sidecar.running),
      requests: Map.get(beat, :running, []),
      resident: Map.get(beat, :resident, []),
      device_memory: Map.get(beat, :device_memory),
      rss: Map.get(beat, :rss),
      counters: Map.get(beat, :counters, %{}),
      error: sidecar.error
    }
  end

  defp sorted_sidecars(state), do: state.sidecars |> Map.values() |> Enum.sort_by(& &1.index)

  defp state_of(state) do
    phases = Enum.map(state.sidecars, fn {_, sidecar} -> phase(sidecar) end)

    cond do
      not state.config[:enabled] -> :disabled
      phases == [] -> :starting
      true -> Enum.find([:loading, :busy, :ready, :stalled, :starting, :down], &(&1 in phases))
    end
  end

  # Answers those who wait for the outcome of a start, once there is one.
  defp settle(%{awaiting_start: []} = state), do: state

  defp settle(state) do
    case state_of(state) do
      undecided when undecided in [:starting, :stalled] ->
        state

      closed when closed in [:disabled, :down] ->
        settle(state, {:error, closed_error(state, closed)})

      _up ->
        settle(state, :ok)
    end
  end

  defp settle(state, answer) do
    Enum.each(state.awaiting_start, &GenServer.reply(&1, answer))
    %{state | awaiting_start: []}
  end

  # Between two heartbeats our own count knows better.
  defp phase(%{state: :draining}), do: :busy

  defp phase(%{state: :ready, running: running}),
    do: if(MapSet.size(running) > 0, do: :busy, else: :ready)

  defp phase(%{state: state}), do: state

  ## Errors

  defp closed_error(_state, :disabled),
    do: Error.new(:disabled, "image generation is disabled in this application's configuration")

  defp closed_error(state, :down), do: unavailable(down_reason(state))

  defp down_reason(state),
    do: Enum.find_value(sorted_sidecars(state), "it has not started", & &1.error)

  defp unavailable(reason),
    do: Error.new(:unavailable, "image generation is not available: #{reason}")

  defp timed_out(request),
    do:
      Error.new(:timeout, "the request was not done within its timeout of #{request.timeout} ms")

  defp cancelled, do: Error.new(:cancelled, "the request was cancelled")

  defp unknown_id,
    do:
      Error.new(:invalid_request, "no request has this id, or it ended too long ago", %{
        field: :id
      })

  defp wire_error(error) do
    kind = Enum.find(Error.kinds(), :internal, &(Atom.to_string(&1) == error.kind))

    field =
      error.field &&
        Enum.find(Map.keys(Request.__struct__()), &(Atom.to_string(&1) == error.field))

    Error.new(kind, error.message, if(field, do: %{field: field}, else: %{}))
  end

  defp native(ms), do: System.convert_time_unit(ms, :millisecond, :native)
  defp now, do: System.monotonic_time(:millisecond)
end
