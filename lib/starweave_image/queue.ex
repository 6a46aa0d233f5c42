defmodule StarweaveImage.Queue do
  @moduledoc false
  # Owns every accepted request until it is answered, exactly once. Sidecars come and go: when one dies, the requests
  # that ran on it return to their places in the queue and are sent again, with the same seeds.
  #
  # This module has the processes, clocks and messages. Pure modules make the decisions: which requests are accepted
  # (`Admission`), which request runs when and where, and what follows from the end of an attempt (`Attempts`, with
  # `Schedule` and `Verdict`), which results are kept (`Results`), how the journal's content is recovered (`Recovery`),
  # and what subscribers are told (`Job`, `Places`). `Crew` handles the sidecars as processes. The caller's process
  # validates requests, and the sidecar's owner encodes and decodes msgpack.

  use GenServer
  use StarweaveImage.CrashLog
  require Logger

  alias StarweaveImage.{Error, Journal, Request}

  alias StarweaveImage.Queue.{
    Admission,
    Attempts,
    Crew,
    Fleet,
    Job,
    Places,
    Recovery,
    RequestLog,
    Results,
    Schedule,
    Verdict
  }

  # `jobs` are the unfinished ones; `monitors` maps each monitor of an owner to the id of its request.
  defstruct [
    :config,
    :journal,
    :journal_problem,
    :admission,
    :attempts,
    :crew,
    :results,
    :forget_timer,
    jobs: %{},
    monitors: %{},
    serial: 0,
    telling_places?: false
  ]

  @places_ms 1_000

  def start_link(config), do: GenServer.start_link(__MODULE__, config, name: config[:name])

  @doc "The name of the instance's journal, if it has one."
  @spec journal(keyword) :: atom
  def journal(config), do: config[:journal] && Module.concat(config[:name], "Journal")

  @doc "Whether a sidecar is up, as last known. Returns at once, even while the queue is busy."
  @spec available?(atom) :: boolean
  defdelegate available?(name), to: Crew

  @impl true
  def init(config) do
    # Without this, `terminate/2` would not run, and callers would get no answer when the instance stops.
    Process.flag(:trap_exit, true)

    state = %__MODULE__{
      config: config,
      journal: journal(config),
      crew: Crew.new(config),
      admission: Admission.new(config),
      attempts: Attempts.new(config),
      results: Results.new(config)
    }

    {:ok, state, {:continue, :recover}}
  end

  @impl true
  def handle_continue(:recover, state), do: {:noreply, recover(state)}

  # Requests in the journal continue after the next start, so no end is recorded for them here.
  @impl true
  def terminate(_reason, state) do
    error = Fleet.unavailable("its instance stops")

    for {id, %{status: :open} = job} <- state.jobs do
      if is_integer(Schedule.place(state.attempts.schedule, id)), do: outlived(state, job)
      Job.deliver(job, {:error, error})
    end

    for {_, %{status: :ending} = job} <- state.jobs, do: Job.deliver(job, job.result)
    for job <- Results.being_read(state.results), do: Job.deliver(job, {:error, error})
    for {_, job} <- state.jobs, from <- job.submitters, do: GenServer.reply(from, {:error, error})
  end

  ## Calls

  @impl true
  def handle_call({:generate, request}, {pid, _} = from, state) do
    case admit(state, request, pid) do
      {:ok, state} -> {:noreply, state |> await(request.id, from) |> dispatch()}
      {:error, error} -> {:reply, {:error, error}, state}
    end
  end

  def handle_call({:submit, request, owner, subscriber}, from, state) do
    case admit(state, request, owner) do
      {:ok, state} ->
        state = if subscriber, do: subscribe(state, request.id, subscriber), else: state
        {:noreply, state |> acknowledge(request.id, from) |> dispatch()}

      {:error, error} ->
        {:reply, {:error, error}, state}
    end
  end

  def handle_call({:await, id}, from, state) do
    if known(state, id),
      do: {:noreply, state |> await(id, from) |> dispatch()},
      else: {:reply, {:error, Admission.unknown_id()}, state}
  end

  def handle_call({:subscribe, id, subscriber}, _from, state) do
    if known(state, id),
      do: {:reply, :ok, state |> subscribe(id, subscriber) |> dispatch()},
      else: {:reply, {:error, :not_found}, state}
  end

  def handle_call({:unsubscribe, id, subscriber}, _from, state) do
    results = Results.leave(state.results, id, subscriber)
    state = %{state | results: results}
    {:reply, :ok, update_job(state, id, &%{&1 | subscribers: &1.subscribers -- [subscriber]})}
  end

  def handle_call({:leave, id, owner}, _from, state),
    do: {:reply, :ok, state |> leave(id, {owner, :any}) |> dispatch()}

  def handle_call({:cancel, id}, from, state) do
    case state.jobs do
      %{^id => %{status: :ending}} ->
        {:reply, {:error, :finished}, state}

      %{^id => job} ->
        # The caller is answered when the request ends: a request reported as cancelled must not return after a restart.
        state = put_job(state, %{job | cancellers: [from | job.cancellers]})
        {:noreply, state |> abandon(id, cancelled()) |> dispatch()}

      _ ->
        {:reply, {:error, if(known(state, id), do: :finished, else: :not_found)}, state}
    end
  end

  def handle_call(:status, _from, state), do: {:reply, status(state), state}

  def handle_call(:await_ready, from, state) do
    taken = Schedule.taken(state.attempts.schedule)
    {:noreply, %{state | crew: Crew.await_start(state.crew, from, taken)}}
  end

  def handle_call(:models, _from, state), do: {:reply, Fleet.models(state.crew.fleet), state}

  def handle_call({:operation, type, model}, from, state) do
    case Fleet.closed(state.crew.fleet) do
      nil -> {:noreply, %{state | crew: Crew.operate(state.crew, type, model, from)}}
      error -> {:reply, {:error, error}, state}
    end
  end

  def handle_call({:add_sidecar, options}, _from, %{crew: crew} = state) do
    if crew.fleet.enabled? do
      {index, crew} = Crew.add(crew, options)
      {:reply, {:ok, index, Keyword.merge(state.config, options)}, %{state | crew: crew}}
    else
      {:reply, {:error, Fleet.closed(crew.fleet)}, state}
    end
  end

  def handle_call({of_one, index}, from, state) when of_one in [:drain, :resume, :removed] do
    if Crew.get(state.crew, index),
      do: of_sidecar(of_one, index, from, state),
      else: {:reply, {:error, :not_found}, state}
  end

  defp of_sidecar(:drain, index, from, state) do
    crew = Crew.drain(state.crew, index, from, Schedule.taken(state.attempts.schedule, index))
    {:noreply, reseat(%{state | crew: crew}, index)}
  end

  defp of_sidecar(:resume, index, _from, state),
    do: {:reply, :ok, state |> seat(index, draining?: false) |> relieve() |> dispatch()}

  defp of_sidecar(:removed, index, _from, state) do
    state = sidecar_gone(state, index)
    state = update_in(state.attempts.schedule, &Schedule.remove_sidecar(&1, index))
    {:reply, :ok, dispatch(%{state | crew: Crew.remove(state.crew, index)})}
  end

  ## Messages from the sidecars

  @impl true
  def handle_cast({:sidecar, owner, index, generation, event}, state) do
    case known_sidecar(state, index, owner, generation) do
      nil -> {:noreply, state}
      state -> {:noreply, state |> sidecar_event(index, event) |> settle() |> dispatch()}
    end
  end

  @impl true
  def handle_info({:DOWN, monitor, :process, pid, _reason}, state) do
    case Fleet.find(state.crew.fleet, monitor) do
      nil ->
        case state.monitors do
          %{^monitor => id} -> {:noreply, state |> leave(id, {pid, monitor}) |> dispatch()}
          _ -> {:noreply, state}
        end

      index ->
        {:noreply, state |> sidecar_gone(index) |> dispatch()}
    end
  end

  def handle_info({:timer, kind, id, serial}, state) do
    case state.jobs do
      %{^id => %{serial: ^serial} = job} -> {:noreply, state |> timer(kind, job) |> dispatch()}
      _ -> {:noreply, state}
    end
  end

  def handle_info({:journal, :open, :ok}, state), do: {:noreply, state |> recover() |> dispatch()}

  def handle_info({:journal, :health, problem}, state),
    do: {:noreply, %{state | journal_problem: problem}}

  def handle_info({:journal, {operation, id}, answer}, state),
    do: {:noreply, state |> journaled(operation, id, answer) |> dispatch()}

  def handle_info({:stored, reader, answer}, state) do
    case Results.end_reading(state.results, reader) do
      {nil, _results} ->
        {:noreply, state}

      {job, results} ->
        {:noreply, %{state | results: results} |> stored(job, answer) |> dispatch()}
    end
  end

  # A reader can also be killed, as a process that waits in code that is reloaded twice is: a new one starts over.
  def handle_info({:EXIT, pid, _reason}, state) do
    case Results.lose_reader(state.results, pid) do
      {nil, _results} -> {:noreply, state}
      {id, results} -> {:noreply, read(%{state | results: results}, id)}
    end
  end

  def handle_info(:forget, state) do
    {gone, results} = Results.expire(state.results, now())
    {:noreply, %{state | results: results} |> forgotten(gone) |> forget_later()}
  end

  def handle_info(:tell_places, state),
    do: {:noreply, tell_places(%{state | telling_places?: false})}

  def handle_info(_message, state), do: {:noreply, state}

  ## Clocks

  defp timer(state, _kind, %{status: status}) when status != :open, do: state
  defp timer(state, :retry, job), do: resume(state, job)

  defp timer(state, :rest, %{request: %{id: id}}),
    do: update_in(state.attempts.schedule, &Schedule.rested(&1, id))

  defp timer(state, kind, %{request: %{id: id}} = job) do
    case Job.timed_out(job, kind, Verdict.deaths(state.attempts.verdict, id)) do
      nil -> state
      error -> abandon(state, id, error)
    end
  end

  ## Admission

  # This includes finished requests whose results are still kept.
  defp known(state, id), do: state.jobs[id] || Results.get(state.results, id)

  defp admit(state, request, owner) do
    known = known(state, request.id)
    fleet = state.crew.fleet
    %{schedule: schedule, verdict: verdict} = state.attempts
    facts = %{fleet: fleet, verdict: verdict, schedule: schedule, now: now()}

    case Admission.decide(state.admission, request, owner != nil, known, facts) do
      :join ->
        {:ok, join(state, known, owner)}

      {:take_in, admission} ->
        # Only now: if the new request were refused, the result of the earlier one must stay.
        state = forget(%{state | admission: admission}, request.id)
        {:ok, enqueue(state, request, owner)}

      {:error, error} ->
        if error.kind in [:overloaded, :rate_limited] do
          {queued, bytes} =
            {Schedule.waiting(state.attempts.schedule), Schedule.bytes(state.attempts.schedule)}

          held = %{queued: queued, bytes: bytes}
          RequestLog.rejected(state.config[:name], request, error, held)
        end

        {:error, error}
    end
  end

  defp enqueue(state, request, owner) do
    job = %Job{
      submitted?: owner == nil,
      request: request,
      model: request.model,
      status: if(request.durable, do: :journaling, else: :open)
    }

    state = open(state, job, request.timeout)
    state = if owner, do: own(state, request.id, owner), else: state

    if request.durable,
      do: Journal.accept(state.journal, request.id, Recovery.record(request, wall()))

    state
  end

  # A new job, or one from the journal, with `left` ms until its deadline.
  defp open(state, %{request: request} = job, left) do
    serial = state.serial + 1
    now = now()

    job =
      %{job | serial: serial, submitted_at: now, deadline: now + left}
      |> Job.start_timer(:deadline, left)
      |> Job.start_timer(:queue, request.queue_timeout)

    RequestLog.began(state.config[:name], request)

    attempts =
      Attempts.open(
        state.attempts,
        request.id,
        if(job.status == :open, do: :waiting, else: :aside),
        priority: request.priority,
        user: request.user_id,
        model: canonical(state, job.model),
        bytes: Request.bytes(request)
      )

    put_job(%{state | serial: serial, attempts: attempts}, job)
  end

  defp canonical(state, model),
    do: Fleet.canonical(state.crew.fleet, model || state.config[:default_model])

  defp join(state, %{status: :finished}, _owner), do: state
  defp join(state, job, nil), do: put_job(state, %{job | submitted?: true})
  defp join(state, job, owner), do: own(state, job.request.id, owner)

  defp own(state, id, owner) do
    monitor = Process.monitor(owner)
    state = update_job(state, id, &%{&1 | owners: [{owner, monitor} | &1.owners]})
    put_in(state.monitors[monitor], id)
  end

  defp disown(state, owners) do
    monitors = for {_owner, monitor} <- owners, do: monitor
    Enum.each(monitors, &Process.demonitor(&1, [:flush]))
    %{state | monitors: Map.drop(state.monitors, monitors)}
  end

  defp acknowledge(state, id, from) do
    case state.jobs[id] do
      %{status: :journaling} = job ->
        put_job(state, %{job | submitters: [from | job.submitters]})

      _ ->
        GenServer.reply(from, {:ok, id})
        state
    end
  end

  # A process that owns the request twice must leave it twice.
  defp leave(state, id, {owner, monitor}) do
    with %{^id => %{owners: owners} = job} <- state.jobs,
         left when left != nil <-
           Enum.find(owners, &(elem(&1, 0) == owner and monitor in [:any, elem(&1, 1)])) do
      owners = List.delete(owners, left)
      state = state |> disown([left]) |> put_job(%{job | owners: owners})
      if owners == [] and not job.submitted?, do: abandon(state, id, cancelled()), else: state
    else
      _not_an_owner -> state
    end
  end

  ## The journal: a request is acknowledged once it is on disk, and answered once its end is on disk

  defp recover(%{journal: nil} = state), do: state

  defp recover(state) do
    case Journal.recover(state.journal) do
      %{unfinished: unfinished, finished: finished} ->
        state = %{state | journal_problem: nil}
        state = Enum.reduce(finished, state, &recover_finished(&2, &1))
        Enum.reduce(unfinished, state, &recover_unfinished(&2, &1))

      # The journal has logged the reason, and will send a message when it can be read again.
      {:error, why} ->
        %{state | journal_problem: why}
    end
  end

  # A request made since this start takes precedence over one of the same id from an earlier run of the application.
  defp recover_unfinished(state, %{id: id} = unfinished) do
    case known(state, id) == nil && Recovery.unfinished(unfinished, state.config[:name], wall()) do
      false ->
        state

      {:ok, job, left} ->
        case Attempts.recovered(state.attempts, id, job.ends) do
          {:go_on, attempts} -> open(%{state | attempts: attempts}, job, left)
          {:give_up, error} -> state |> open(job, left) |> finish(id, {:error, error})
        end

      {:error, %{result: {:error, error} = result} = job} ->
        Logger.error("a request of the journal is not resumed: #{error.message}", request_id: id)
        Journal.finish(state.journal, id, result)
        keep(state, job, state.config[:result_ttl])
    end
  end

  defp recover_finished(state, %{id: id} = finished) do
    if known(state, id) do
      state
    else
      record = Journal.job(state.journal, id)
      {name, ttl} = {state.config[:name], state.config[:result_ttl]}
      {job, left} = Recovery.finished(finished, record, name, wall(), ttl)
      keep(state, job, left)
    end
  end

  defp journaled(state, :accept, id, answer) do
    case state.jobs do
      %{^id => %{submitters: submitters} = job} ->
        error = with {:error, why} <- answer, do: Recovery.not_kept(why)
        reply = if error == :ok, do: {:ok, id}, else: {:error, error}
        Enum.each(submitters, &GenServer.reply(&1, reply))
        job = %{job | submitters: []}

        cond do
          # The request ended while it was being journaled.
          job.status != :journaling ->
            put_job(state, job)

          error == :ok ->
            # A timer that fired during journaling was ignored.
            passed = now() - job.submitted_at
            job = %{job | status: :open}
            job = renew_timer(job, :deadline, job.request.timeout - passed)
            wait = job.request.queue_timeout
            job = renew_timer(job, :queue, wait && wait - passed)
            state |> put_job(job) |> resume(job)

          true ->
            # The request was not accepted, so its end must not be journaled either.
            job = %{job | request: %{job.request | durable: false}, submitted?: false}
            state |> put_job(job) |> finish(id, {:error, error})
        end

      _ ->
        state
    end
  end

  defp journaled(state, :finish, id, answer) do
    case state.jobs[id] do
      %{status: :ending} = job ->
        with {:error, why} <- answer do
          Logger.error("the end of a request cannot be kept on disk: #{why}", request_id: id)
        end

        end_of(state, job)

      _ ->
        state
    end
  end

  defp journaled(state, _operation, _id, _answer), do: state

  defp renew_timer(job, kind, ms),
    do: job |> Job.stop_timer(kind) |> Job.start_timer(kind, ms && max(ms, 0))

  ## Dispatch

  # Puts a request that stood aside back into the queue.
  defp resume(state, job) do
    state = update_in(state.attempts.schedule, &Schedule.resume(&1, job.request.id))
    if job.subscribers == [], do: state, else: tell_places_soon(state)
  end

  defp dispatch(state) do
    case Attempts.next(state.attempts, &(state.jobs[&1].deadline - now())) do
      {:run, id, index, attempts} ->
        %{state | attempts: attempts} |> run(state.jobs[id], index) |> dispatch()

      # The request's sidecar is free, and must rest before the request begins.
      {:rest, id, pause, attempts} ->
        job = state.jobs[id] |> Job.stop_timer(:rest) |> Job.start_timer(:rest, pause)
        %{state | attempts: attempts} |> put_job(job) |> dispatch()

      {:yield, id, index, attempts} ->
        Crew.send_to(state.crew, index, %{t: "cancel", id: id})
        dispatch(%{state | attempts: attempts})

      :nothing ->
        state
    end
  end

  defp run(state, %{request: %{id: id} = request} = job, index) do
    now = now()

    # Counted before it is sent: a request that brings down the whole application must still count as an attempt.
    if request.durable, do: Journal.attempt(state.journal, id, job.ends + 1)

    left = max(job.deadline - now, 1)
    left = if request.run_timeout, do: min(left, request.run_timeout), else: left
    message = %{request | model: job.model} |> Request.to_wire(left) |> Map.put(:t, "generate")
    Crew.send_to(state.crew, index, message)

    job =
      job
      |> Job.begin(now)
      |> Job.stop_timer(:queue)
      |> Job.start_timer(:run, request.run_timeout)

    put_job(state, job)
  end

  ## Events of a sidecar

  # Nil where the message is from a removed sidecar, or from an owner that has been replaced.
  defp known_sidecar(state, index, owner, generation) do
    case Fleet.owner(state.crew.fleet, index, owner) do
      :present ->
        seat(state, index, generation: generation)

      :new ->
        state = sidecar_gone(state, index)
        state = %{state | crew: Crew.sign_on(state.crew, index, owner)}
        seat(state, index, generation: generation)

      former when former in [:former, :of_no_seat] ->
        nil
    end
  end

  defp sidecar_gone(state, index) do
    case Crew.sign_off(state.crew, index) do
      {:ok, crew} ->
        sentence = "its owner process crashed"
        sidecar_event(%{state | crew: crew}, index, {:ended, :starting, sentence})

      :off ->
        state
    end
  end

  # Updates a seat, in the schedule as well.
  defp seat(state, index, news),
    do: reseat(%{state | crew: Crew.update(state.crew, index, news)}, index)

  defp reseat(state, index) do
    slots = Crew.slots(state.crew, index)
    update_in(state.attempts.schedule, &Schedule.sidecar(&1, index, slots))
  end

  # A spare takes over from an active sidecar that is gone.
  defp relieve(state) do
    {changed, crew} = Crew.relieve(state.crew)
    Enum.reduce(changed, %{state | crew: crew}, &reseat(&2, &1))
  end

  defp sidecar_event(state, index, {:ended, phase, sentence}) do
    {outcomes, attempts} =
      if Crew.get(state.crew, index).stopping? do
        Attempts.stopped(state.attempts, index)
      else
        open =
          for {id, %{status: :open, request: request}} <- state.jobs, into: %{}, do: {id, request}

        Attempts.died(state.attempts, index, death(state, index), open, sentence, now())
      end

    crew = Crew.ended(state.crew, index, phase, sentence)
    state = %{state | attempts: attempts, crew: crew} |> reseat(index) |> relieve()
    state = Enum.reduce(outcomes, state, &outcome(&2, &1))
    state = %{state | crew: Crew.operations_lost(state.crew, index, sentence)} |> drained(index)
    if Fleet.down?(state.crew.fleet), do: fail_all(state), else: state
  end

  defp sidecar_event(state, index, {:message, %{t: type, id: id} = message})
       when type in [:accepted, :progress, :preview, :image, :result] do
    case running(state, index, id) do
      nil ->
        state

      job ->
        {job, event} =
          Job.heard(job, message, Schedule.attempts(state.attempts.schedule, id), now())

        with {:progress, seen} <- event, do: RequestLog.progressed(state.config[:name], id, seen)
        if event, do: Job.tell(job, event)
        put_job(state, job)
    end
  end

  defp sidecar_event(state, index, {:message, %{t: :done, id: id} = done}) do
    cond do
      Crew.operation?(state.crew, id) -> operated(state, id, index, nil)
      slot?(state, index, id) -> state |> finish_done(index, id, done) |> free(index, id)
      true -> stray(state, id)
    end
  end

  defp sidecar_event(state, index, {:message, %{t: :error, id: id} = error}) do
    cond do
      Crew.operation?(state.crew, id) ->
        operated(state, id, index, Job.error(error))

      slot?(state, index, id) ->
        case running(state, index, id) do
          nil -> free(state, index, id)
          job -> state |> free(index, id) |> failed(job, Job.error(error))
        end

      true ->
        stray(state, id)
    end
  end

  # A sidecar reports its own state.
  defp sidecar_event(state, index, news) do
    state = reseat(%{state | crew: Crew.heard(state.crew, index, news)}, index)
    if match?({:ready, _}, news), do: to_work(state), else: state
  end

  defp to_work(state) do
    state = relieve(state)
    %{state | crew: Crew.begin_operations(state.crew)}
  end

  # A request may have ended here, and its id may be in use again, while the sidecar still holds its slot.
  defp slot?(state, index, id), do: id in Schedule.taken(state.attempts.schedule, index)

  defp running(state, index, id) do
    case state.jobs do
      %{^id => %{status: :open} = job} ->
        if Schedule.place(state.attempts.schedule, id) == index, do: job

      _ ->
        nil
    end
  end

  # A second answer, or one to a question that was never asked.
  defp stray(state, id) do
    Logger.debug("a sidecar answered for #{inspect(id)}, which is not running there")
    state
  end

  defp free(state, index, id),
    do: drained(update_in(state.attempts.schedule, &Schedule.free(&1, index, id)), index)

  defp drained(state, index) do
    taken = Schedule.taken(state.attempts.schedule, index)
    %{state | crew: Crew.drained(state.crew, index, taken)}
  end

  defp operated(state, id, index, error),
    do: %{state | crew: Crew.operated(state.crew, id, index, error)}

  ## Failures

  # The facts about the death of a sidecar. Requests that had already ended here, operations, and loads that no request
  # waits for count as work and as company, like everything else that ran there.
  defp death(state, index) do
    taken = Schedule.taken(state.attempts.schedule, index)
    running = for id <- taken, job = running(state, index, id), do: job
    models = for job <- running, do: canonical(state, job.model)
    also? = Crew.other_work?(state.crew, index, models)

    %{
      ran: for(job <- running, do: {job.request.id, Job.point(job, now())}),
      alone?: length(taken) == 1 and not also?,
      held: List.wrap(Schedule.resting(state.attempts.schedule, index)),
      at_work?: taken != [] or also?
    }
  end

  defp failed(state, %{request: %{id: id}} = job, error) do
    left = job.deadline - now()
    facts = %{retries: job.retries, left: left, fallbacks: fallbacks(state, job)}
    {outcome, attempts} = Attempts.failed(state.attempts, id, error, facts)
    outcome(%{state | attempts: attempts}, outcome)
  end

  defp outcome(state, {:again, id, reason}), do: again(state, state.jobs[id], reason)

  defp outcome(state, {:retry, id, pause}) do
    job = state.jobs[id] |> Job.retry() |> Job.start_timer(:retry, pause)
    again(state, job, :failed)
  end

  defp outcome(state, {:fallback, id, model, rest, error}),
    do: again(state, Job.replace_model(state.jobs[id], model, rest, error), :failed)

  defp outcome(state, {:end, id, error}) do
    if error.kind == :sidecar_crashed,
      do: Logger.warning("a request is given up: #{error.message}", request_id: id)

    finish(state, id, {:error, error})
  end

  defp again(state, %{request: %{id: id}} = job, reason) do
    state = state |> put_job(job |> Job.stop_timer(:run) |> Job.reset()) |> outlived(job)

    RequestLog.again(
      state.config[:name],
      id,
      Schedule.attempts(state.attempts.schedule, id),
      reason
    )

    tell_queued(state, id)
  end

  # The models not yet tried from the fallbacks in the requested model's card.
  defp fallbacks(_state, %{request: %{fallback: false}}), do: []
  defp fallbacks(_state, %{fallbacks: [_ | _] = rest}), do: rest
  defp fallbacks(_state, %{fallbacks: []}), do: []

  defp fallbacks(state, job), do: Fleet.fallbacks(state.crew.fleet, canonical(state, job.model))

  # The application survived the attempt, so the attempt is not counted as one that ended it.
  defp outlived(state, %{request: %{id: id, durable: true}, ends: ends}) do
    Journal.attempt(state.journal, id, ends)
    state
  end

  defp outlived(state, _job), do: state

  defp fail_all(state) do
    error = Fleet.closed(state.crew.fleet)
    # Requests on disk can wait for a working sidecar until their deadlines.
    ids = for {id, %{status: :open, request: %{durable: false}}} <- state.jobs, do: id
    Enum.reduce(ids, state, &finish(&2, &1, {:error, error}))
  end

  ## The end of a request

  defp finish_done(state, index, id, done) do
    case running(state, index, id) do
      nil ->
        state

      job ->
        load_ms = Map.get(done.timings || %{}, "load", 0)
        run_ms = now() - job.dispatched_at
        result = Job.result(job, done, Schedule.attempts(state.attempts.schedule, id))

        attempts =
          if match?({:ok, _}, result),
            do: Attempts.done(state.attempts, job.request, index, run_ms, load_ms, now()),
            else: Attempts.measured(state.attempts, index, run_ms, load_ms)

        finish(%{state | attempts: attempts}, id, result)
    end
  end

  # Ends a request at once. If it was running, its slot stays taken until the sidecar confirms.
  defp abandon(state, id, error) do
    with index when is_integer(index) <- Schedule.place(state.attempts.schedule, id),
         true <- slot?(state, index, id),
         do: Crew.send_to(state.crew, index, %{t: "cancel", id: id})

    finish(state, id, {:error, error})
  end

  defp finish(state, id, result) do
    case state.jobs do
      %{^id => %{status: status} = job} when status in [:open, :journaling] ->
        job = Job.stop_timers(job)
        state = disown(state, job.owners)
        # First, so that the telemetry event is already emitted when a caller gets the answer.
        tell_end(state, job, result)
        state = %{state | attempts: Attempts.drop(state.attempts, id)}
        job = %{job | owners: [], result: result, status: :ending, images: [], previews: %{}}

        if job.request.durable do
          Journal.finish(state.journal, id, result)
          put_job(state, job)
        else
          end_of(state, job)
        end

      _ ->
        state
    end
  end

  # Delivers the result to those who wait. A submitted request's result is also kept, to be asked for later.
  defp end_of(state, %{request: %{id: id}} = job) do
    Job.deliver(job, job.result)
    state = %{state | jobs: Map.delete(state.jobs, id)}
    if job.submitted?, do: keep(state, Job.ended(job), state.config[:result_ttl]), else: state
  end

  ## Kept results

  defp keep(state, job, ttl) do
    {gone, results} = Results.keep(state.results, job, now() + ttl)
    %{state | results: results} |> forgotten(gone) |> forget_later()
  end

  defp forget_later(state) do
    if state.forget_timer, do: Process.cancel_timer(state.forget_timer)
    at = Results.next_expiry(state.results)
    %{state | forget_timer: at && Process.send_after(self(), :forget, at, abs: true)}
  end

  defp forget(state, id) do
    {job, results} = Results.drop(state.results, id)
    forgotten(%{state | results: results}, List.wrap(job))
  end

  defp forgotten(state, jobs) do
    for %{request: %{id: id, durable: durable?}} = job <- jobs do
      if durable?, do: Journal.forget(state.journal, id)
      # Processes may still wait for this result to be read from the disk.
      Job.deliver(job, {:error, Admission.unknown_id()})
    end

    state
  end

  defp ask(state, id, asker) do
    case Results.ask(state.results, id, asker) do
      {:deliver, job} ->
        Job.deliver(job, job.result)
        state

      {:wait, results} ->
        %{state | results: results}

      {:read, results} ->
        read(%{state | results: results}, id)
    end
  end

  # A result from before this start is on disk only. A process of its own reads it, so that the queue does not block.
  defp read(state, id) do
    reader = spawn_link(__MODULE__, :read_result, [self(), state.journal, id])
    %{state | results: Results.begin_reading(state.results, id, reader)}
  end

  @doc false
  def read_result(queue, journal, id),
    do: send(queue, {:stored, self(), Journal.result(journal, id)})

  # The result's files were damaged after the start: the request runs again.
  defp stored(state, %{request: %{id: id}} = job, {:unfinished, unfinished}) do
    {_job, results} = Results.drop(state.results, id)
    state = recover_unfinished(%{state | results: results}, unfinished)

    case known(state, id) do
      %{status: :finished, result: result} ->
        Job.deliver(job, result)
        state

      again ->
        state = put_job(state, Map.merge(again, Map.take(job, [:waiters, :subscribers])))
        if again.status == :open, do: tell_queued(state, id), else: state
    end
  end

  defp stored(state, job, answer) do
    result =
      case answer do
        {:ok, result} -> result
        {:error, why} -> {:error, Fleet.unavailable(why)}
      end

    Job.deliver(job, result)
    state
  end

  defp tell_end(state, %{request: %{id: id}} = job, result) do
    seat = Crew.get(state.crew, Schedule.place(state.attempts.schedule, id))

    RequestLog.ended(state.config[:name], job, result, %{
      now: now(),
      attempts: Schedule.attempts(state.attempts.schedule, id),
      model: canonical(state, job.model),
      memory: seat && seat.heartbeat
    })
  end

  ## Waiters and subscribers

  defp await(state, id, from) do
    case state.jobs do
      %{^id => job} -> put_job(state, %{job | waiters: [from | job.waiters]})
      _ -> ask(state, id, {:waiter, from})
    end
  end

  # A subscriber is `{:process, pid}` or, for a stream, `{:alias, reference}`.
  defp subscribe(state, id, subscriber) do
    case state.jobs do
      %{^id => job} ->
        late = %{job | subscribers: [subscriber]}
        for event <- Places.late(state.attempts.schedule, job), do: Job.tell(late, event)
        subscribers = Enum.uniq([subscriber | job.subscribers])
        state |> put_job(%{job | subscribers: subscribers}) |> tell_places_soon()

      _ ->
        ask(state, id, {:subscriber, subscriber})
    end
  end

  defp tell_queued(state, id) do
    case state.jobs[id] do
      %{subscribers: []} ->
        state

      job ->
        {:queued, %{position: position}} = event = Places.event(state.attempts.schedule, id)
        Job.tell(job, event)
        state |> put_job(%{job | told: position}) |> tell_places_soon()
    end
  end

  # Subscribers of waiting requests are told at most once a second that their request has moved up.
  defp tell_places_soon(%{telling_places?: true} = state), do: state

  defp tell_places_soon(state) do
    Process.send_after(self(), :tell_places, @places_ms)
    %{state | telling_places?: true}
  end

  defp tell_places(state) do
    {news, watched?} = Places.news(state.attempts.schedule, state.jobs)
    state = Enum.reduce(news, state, &tell_queued(&2, &1.request.id))
    if watched?, do: tell_places_soon(state), else: state
  end

  defp put_job(state, job), do: %{state | jobs: Map.put(state.jobs, job.request.id, job)}

  defp update_job(state, id, fun) do
    case state.jobs do
      %{^id => job} -> put_job(state, fun.(job))
      _ -> state
    end
  end

  ## Status

  defp status(state) do
    taken = Schedule.taken(state.attempts.schedule)

    %{
      state: Fleet.state(state.crew.fleet, taken),
      error: Fleet.error(state.crew.fleet),
      default_model: state.config[:default_model],
      sidecars: Fleet.statuses(state.crew.fleet, taken),
      journal:
        state.journal && %{usable?: state.journal_problem == nil, error: state.journal_problem},
      queue: Schedule.status(state.attempts.schedule)
    }
  end

  defp settle(state),
    do: %{state | crew: Crew.settle(state.crew, Schedule.taken(state.attempts.schedule))}

  defp cancelled, do: Error.new(:cancelled, "the request was cancelled")

  defp now, do: System.monotonic_time(:millisecond)
  defp wall, do: System.system_time(:millisecond)
end
