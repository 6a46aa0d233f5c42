defmodule StarweaveImage.Queue do
  @moduledoc false
  # Owns every accepted request until it has its one answer. Sidecars come and go; a request that was
  # running on one that died goes back to its place and is sent again, with the same seed.
  #
  # Who goes when and where is decided by `Schedule`, what follows from the end of an attempt by `Verdict`, how the
  # sidecars are is known by `Fleet`, all pure; here are the processes, clocks and messages. Validation is done in the
  # caller, msgpack in the sidecar's owner.

  use GenServer
  use StarweaveImage.CrashLog
  require Logger

  alias StarweaveImage.{Error, Journal, Request, Result, Sidecar, Telemetry}
  alias StarweaveImage.Queue.{Fleet, Job, Operations, RateLimit, RequestLog, Schedule, Verdict}

  defstruct [
    :config,
    :journal,
    :journal_problem,
    :schedule,
    :fleet,
    :rates,
    :verdict,
    jobs: %{},
    monitors: %{},
    serial: 0,
    finished: :gb_sets.new(),
    readers: %{},
    result_bytes: 0,
    operations: Operations.new(),
    awaiting_start: [],
    drains: %{},
    telling_positions?: false
  ]

  @positions_ms 1_000

  def start_link(config), do: GenServer.start_link(__MODULE__, config, name: config[:name])

  @doc "The name of the instance's journal, if it has one."
  @spec journal(keyword) :: atom
  def journal(config), do: config[:journal] && Module.concat(config[:name], "Journal")

  @doc "Whether a sidecar is up, as last known: answered by a table, whatever the queue is doing."
  @spec available?(atom) :: boolean
  def available?(name) do
    :ets.lookup_element(table(name), :available?, 2)
  rescue
    # No queue, no table.
    ArgumentError -> false
  end

  defp table(name), do: Module.concat(name, "Available")

  @impl true
  def init(config) do
    :ets.new(table(config[:name]), [:named_table, :protected, read_concurrency: true])
    # So that `terminate/2` runs: whoever waits gets an answer also when the instance stops.
    Process.flag(:trap_exit, true)

    state = %__MODULE__{
      config: config,
      journal: journal(config),
      schedule: Schedule.new(config),
      rates: RateLimit.new(config[:rate_limit], config[:user_rate_limit]),
      verdict: Verdict.new(config)
    }

    fleet = Fleet.new(config[:enabled], config[:layout])
    {:ok, put_fleet(state, fleet), {:continue, :recover}}
  end

  @impl true
  def handle_continue(:recover, state), do: {:noreply, recover(state)}

  # What is in the journal goes on with the next start, so its end is not written there.
  @impl true
  def terminate(_reason, state) do
    error = unavailable("its instance stops")

    for {id, %{status: :open} = job} <- state.jobs do
      if is_integer(Schedule.place(state.schedule, id)), do: outlived(state, job)
      Job.deliver(job, {:error, error})
    end

    for {_, %{status: :ending} = job} <- state.jobs, do: Job.deliver(job, job.result)
    for {_, %{reading?: true} = job} <- state.jobs, do: Job.deliver(job, {:error, error})
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
    case state.jobs do
      %{^id => _} -> {:noreply, state |> await(id, from) |> dispatch()}
      _ -> {:reply, {:error, unknown_id()}, state}
    end
  end

  def handle_call({:subscribe, id, subscriber}, _from, state) do
    if Map.has_key?(state.jobs, id),
      do: {:reply, :ok, state |> subscribe(id, subscriber) |> dispatch()},
      else: {:reply, {:error, :not_found}, state}
  end

  def handle_call({:unsubscribe, id, subscriber}, _from, state) do
    {:reply, :ok, update_job(state, id, &%{&1 | subscribers: &1.subscribers -- [subscriber]})}
  end

  def handle_call({:leave, id, owner}, _from, state),
    do: {:reply, :ok, state |> leave(id, {owner, :any}) |> dispatch()}

  def handle_call({:cancel, id}, from, state) do
    case state.jobs do
      %{^id => %{status: status}} when status in [:ending, :finished] ->
        {:reply, {:error, :finished}, state}

      %{^id => job} ->
        # Answered with the end: whoever was told that it is cancelled must not see it again after a restart.
        state = put_job(state, %{job | cancellers: [from | job.cancellers]})
        {:noreply, state |> abandon(id, cancelled()) |> dispatch()}

      _ ->
        {:reply, {:error, :not_found}, state}
    end
  end

  def handle_call(:status, _from, state), do: {:reply, status(state), state}

  def handle_call(:await_ready, from, state),
    do: {:noreply, settle(%{state | awaiting_start: [from | state.awaiting_start]})}

  def handle_call(:models, _from, state), do: {:reply, Fleet.models(state.fleet), state}

  def handle_call({:operation, type, model}, from, state) do
    case closed(state) do
      nil ->
        id = "#{type}-#{System.unique_integer([:positive])}"
        message = %{t: type, id: id, model: model}
        operations = Operations.add(state.operations, id, message, from)
        {:noreply, start_operations(%{state | operations: operations})}

      error ->
        {:reply, {:error, error}, state}
    end
  end

  def handle_call({:add_sidecar, _options}, _from, %{fleet: %{enabled?: false}} = state),
    do: {:reply, {:error, closed(state)}, state}

  def handle_call({:add_sidecar, options}, _from, state) do
    {index, fleet} = Fleet.add(state.fleet, options)
    {:reply, {:ok, index, Keyword.merge(state.config, options)}, put_fleet(state, fleet)}
  end

  def handle_call({:drain, index}, from, state) do
    case Fleet.get(state.fleet, index) do
      nil ->
        {:reply, {:error, :not_found}, state}

      _seat ->
        state = update_in(state.drains[index], &[from | &1 || []])
        {:noreply, state |> seat(index, draining?: true) |> drained(index)}
    end
  end

  def handle_call({:resume, index}, _from, state) do
    case Fleet.get(state.fleet, index) do
      nil -> {:reply, {:error, :not_found}, state}
      _seat -> {:reply, :ok, state |> seat(index, draining?: false) |> relieve() |> dispatch()}
    end
  end

  def handle_call({:removed, index}, _from, state) do
    state = if Fleet.get(state.fleet, index), do: sidecar_gone(state, index), else: state

    state = %{state | schedule: Schedule.remove_sidecar(state.schedule, index)}
    {:reply, :ok, state |> put_fleet(Fleet.remove(state.fleet, index)) |> dispatch()}
  end

  ## What the sidecars say

  @impl true
  def handle_cast({:sidecar, owner, index, generation, event}, state) do
    case known_sidecar(state, index, owner, generation) do
      nil -> {:noreply, state}
      state -> {:noreply, state |> sidecar_event(index, event) |> settle() |> dispatch()}
    end
  end

  @impl true
  def handle_info({:DOWN, monitor, :process, pid, _reason}, state) do
    case Fleet.find(state.fleet, monitor) do
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

  def handle_info({:stored, id, serial, answer}, state) do
    case state.jobs do
      %{^id => %{serial: ^serial} = job} -> {:noreply, state |> stored(job, answer) |> dispatch()}
      _ -> {:noreply, state}
    end
  end

  def handle_info(:tell_positions, state),
    do: {:noreply, tell_positions(%{state | telling_positions?: false})}

  def handle_info({:EXIT, pid, reason}, %{readers: readers} = state)
      when is_map_key(readers, pid),
      do: {:noreply, reader_ended(state, pid, reason)}

  def handle_info(_message, state), do: {:noreply, state}

  ## Clocks

  defp timer(state, :forget, %{status: :finished} = job), do: forget(state, job)
  defp timer(state, _kind, %{status: status}) when status != :open, do: state

  defp timer(state, :deadline, %{request: request}) do
    message = "the request was not done within its timeout of #{request.timeout} ms"

    died =
      case Verdict.deaths(state.verdict, request.id) do
        0 ->
          ""

        1 ->
          "; the Python process ended under it once"

        n ->
          "; the Python process ended under it #{n} times, which is not shown to be its own doing"
      end

    abandon(state, request.id, Error.new(:timeout, message <> died))
  end

  defp timer(state, :queue, %{request: request, dispatched_at: nil}) do
    message = "the request was not begun within its queue_timeout of #{request.queue_timeout} ms"
    abandon(state, request.id, Error.new(:timeout, message))
  end

  defp timer(state, :run, %{request: request}) do
    message = "an attempt was not done within its run_timeout of #{request.run_timeout} ms"
    abandon(state, request.id, Error.new(:timeout, message))
  end

  defp timer(state, :retry, job), do: resume(state, job)

  defp timer(state, :rest, %{request: %{id: id}}),
    do: %{state | schedule: Schedule.rested(state.schedule, id)}

  defp timer(state, _kind, _job), do: state

  ## Admission

  # A known id is the same request asked for again, not a second one; but what failed may be tried again.
  defp admit(%{jobs: jobs} = state, %{id: id} = request, owner) when is_map_key(jobs, id) do
    job = jobs[id]

    cond do
      failed?(job) -> take_in(state, request, owner)
      Request.same?(job.request, request) -> {:ok, join(state, job, owner)}
      true -> {:error, conflict()}
    end
  end

  defp admit(state, request, owner), do: take_in(state, request, owner)

  defp failed?(%{status: :finished, result: {kind, outcome}}),
    do: kind == :error or {kind, outcome} == {:stored, :error}

  defp failed?(_job), do: false

  defp take_in(state, request, owner) do
    bytes = Request.bytes(request)

    with :ok <- durable(state, request, owner),
         nil <- closed(state),
         :ok <- Verdict.admit(state.verdict, request, now()),
         :ok <- room(state, bytes),
         {:ok, rates} <- RateLimit.take(state.rates, request.user_id, now()) do
      state = %{state | rates: rates}
      # Not before: one that is refused leaves the end of the earlier one as it is.
      earlier = state.jobs[request.id]
      state = if earlier, do: forget(state, earlier), else: state
      {:ok, enqueue(state, request, owner, bytes)}
    else
      {:error, error} -> {:error, error}
      %Error{} = error -> {:error, error}
      {:overloaded, ms} -> {:error, refused(state, request, overloaded(state, ms))}
      {:wait, ms} -> {:error, refused(state, request, rate_limited(ms))}
    end
  end

  defp durable(_state, %{durable: false}, _owner), do: :ok

  defp durable(%{journal: nil}, _request, _owner),
    do: {:error, invalid(:durable, "durable needs the instance's option journal")}

  defp durable(_state, _request, nil), do: :ok

  defp durable(_state, _request, _owner),
    do: {:error, invalid(:durable, "durable is for submit, which does not end with its caller")}

  defp room(state, bytes), do: Schedule.admit(state.schedule, bytes)

  defp refused(state, request, error) do
    Telemetry.execute(
      [:queue, :rejected],
      %{queued: Schedule.waiting(state.schedule), bytes: Schedule.bytes(state.schedule)},
      %{instance: state.config[:name], id: request.id, kind: error.kind}
    )

    error
  end

  defp enqueue(state, request, owner, bytes) do
    job = %Job{
      submitted?: owner == nil,
      request: request,
      model: request.model,
      status: if(request.durable, do: :journaling, else: :open)
    }

    state = open(state, job, request.timeout, bytes)
    state = if owner, do: own(state, request.id, owner), else: state
    if request.durable, do: Journal.accept(state.journal, request.id, record(request))
    state
  end

  # A new job, or one of the journal, with `left` ms until its deadline.
  defp open(state, %{request: request} = job, left, bytes) do
    serial = state.serial + 1
    now = now()

    job =
      %{job | serial: serial, submitted_at: now, deadline: now + left}
      |> Job.start_timer(:deadline, left)
      |> Job.start_timer(:queue, request.queue_timeout)

    Telemetry.execute([:request, :start], %{system_time: System.system_time()}, %{
      instance: state.config[:name],
      id: request.id,
      model: request.model,
      user_id: request.user_id,
      priority: request.priority
    })

    schedule =
      Schedule.push(
        state.schedule,
        request.id,
        if(job.status == :open, do: :waiting, else: :aside),
        priority: request.priority,
        user: request.user_id,
        model: canonical(state, job.model),
        bytes: bytes,
        company: Verdict.company(state.verdict, request.id)
      )

    put_job(%{state | serial: serial, schedule: schedule}, job)
  end

  defp canonical(state, nil), do: state.config[:default_model]

  defp canonical(state, model) do
    case Fleet.card(state.fleet, model) do
      nil -> model
      card -> card.id
    end
  end

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

  # Who owns it twice leaves it twice.
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

  ## The journal: a request is acknowledged when it is on disk, and answered when its end is

  defp record(request) do
    %{
      "request" => Request.to_record(request),
      "submitted_at" => System.system_time(:millisecond)
    }
  end

  defp recover(%{journal: nil} = state), do: state

  defp recover(state) do
    case Journal.recover(state.journal) do
      %{unfinished: unfinished, finished: finished} ->
        state = %{state | journal_problem: nil}
        state = Enum.reduce(finished, state, &recover_finished(&2, &1))
        Enum.reduce(unfinished, state, &recover_unfinished(&2, &1))

      # It has said why, and will say when it can be asked again.
      {:error, why} ->
        %{state | journal_problem: why}
    end
  end

  # What was asked for meanwhile goes before what was asked for in an earlier life.
  defp recover_unfinished(state, %{id: id}) when is_map_key(state.jobs, id), do: state

  defp recover_unfinished(state, %{id: id, job: record, attempts: ends}) do
    case Request.restore(record["request"], state.config[:name]) do
      {:ok, request} ->
        elapsed = System.system_time(:millisecond) - record["submitted_at"]
        # The clock may have been set back meanwhile.
        left = request.timeout - min(max(elapsed, 0), request.timeout)
        job = %Job{request: request, model: request.model, submitted?: true, ends: ends}

        case Verdict.recovered(state.verdict, id, ends) do
          {:go_on, verdict} ->
            open(%{state | verdict: verdict}, job, left, Request.bytes(request))

          {:give_up, error} ->
            state |> open(job, left, Request.bytes(request)) |> finish(id, {:error, error})
        end

      {:error, error} ->
        Logger.error("a request of the journal is not resumed: #{error.message}", request_id: id)
        Journal.finish(state.journal, id, {:error, error})
        job = %Job{request: unreadable(id), status: :finished, submitted?: true}
        remember(state, %{job | result: {:error, error}}, state.config[:result_ttl])
    end
  end

  # What was asked for is not known, so nothing is the same as it.
  defp unreadable(id), do: %Request{id: id, durable: true, prompt: "", seed: 0}

  defp recover_finished(state, %{id: id}) when is_map_key(state.jobs, id), do: state

  defp recover_finished(state, %{id: id, finished_at: finished_at, outcome: outcome}) do
    request =
      with {:ok, %{job: record}} <- Journal.job(state.journal, id),
           {:ok, request} <- Request.restore(record["request"], state.config[:name]) do
        request
      else
        # The result is there all the same.
        {:error, _} -> unreadable(id)
      end

    age = max(System.system_time(:millisecond) - finished_at, 0)
    job = %Job{request: request, status: :finished, submitted?: true, result: {:stored, outcome}}
    remember(state, job, max(state.config[:result_ttl] - age, 0))
  end

  defp journaled(state, :accept, id, answer) do
    case state.jobs do
      %{^id => %{submitters: submitters} = job} ->
        error = with {:error, why} <- answer, do: not_kept(why)
        reply = if error == :ok, do: {:ok, id}, else: {:error, error}
        Enum.each(submitters, &GenServer.reply(&1, reply))
        job = %{job | submitters: []}

        cond do
          # It was cancelled meanwhile.
          job.status != :journaling ->
            put_job(state, job)

          error == :ok ->
            # One that went off meanwhile was not heard.
            passed = now() - job.submitted_at
            job = %{job | status: :open}
            job = renew_timer(job, :deadline, job.request.timeout - passed)
            wait = job.request.queue_timeout
            job = renew_timer(job, :queue, wait && wait - passed)
            state |> put_job(job) |> resume(job)

          true ->
            # Not accepted, so there is no end of it to write either.
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

  # It waits for its turn again, after it stood aside.
  defp resume(state, job) do
    state = %{state | schedule: Schedule.resume(state.schedule, job.request.id)}
    if job.subscribers == [], do: state, else: tell_positions_soon(state)
  end

  defp dispatch(state) do
    case Schedule.next(state.schedule) do
      {:run, id, index, schedule} ->
        run(%{state | schedule: schedule}, state.jobs[id], index) |> dispatch()

      {:rest, id, _index, schedule} ->
        rest(%{state | schedule: schedule}, state.jobs[id]) |> dispatch()

      {:yield, id, index, schedule} ->
        send_to(Fleet.get(state.fleet, index), %{t: "cancel", id: id})
        dispatch(%{state | schedule: schedule})

      :nothing ->
        state
    end
  end

  # Its sidecar is free for it, and rests before it begins.
  defp rest(state, %{request: %{id: id}} = job) do
    {pause, verdict} = Verdict.stake(state.verdict, id, job.deadline - now())
    job = job |> Job.stop_timer(:rest) |> Job.start_timer(:rest, pause)
    put_job(%{state | verdict: verdict}, job)
  end

  defp run(state, %{request: %{id: id} = request} = job, index) do
    now = now()
    # Counted before it is sent: a request that ends the whole application must not be free.
    if request.durable, do: Journal.attempt(state.journal, id, job.ends + 1)

    left = max(job.deadline - now, 1)
    left = if request.run_timeout, do: min(left, request.run_timeout), else: left
    message = %{request | model: job.model} |> Request.to_wire(left) |> Map.put(:t, "generate")
    send_to(Fleet.get(state.fleet, index), message)

    job =
      job
      |> Job.begin(now)
      |> Job.stop_timer(:queue)
      |> Job.start_timer(:run, request.run_timeout)

    put_job(state, job)
  end

  defp send_to(seat, message) do
    message = Map.put(message, :g, seat.generation)
    Sidecar.send_message(seat.pid, seat.generation, message)
  end

  ## Events of a sidecar

  # Nil where the news are of a sidecar that was removed, or of an owner whose place another one has taken.
  defp known_sidecar(state, index, owner, generation) do
    case Fleet.owner(state.fleet, index, owner) do
      :present -> seat(state, index, generation: generation)
      :new -> state |> new_sidecar(index, owner) |> seat(index, generation: generation)
      :former -> nil
      :of_no_seat -> nil
    end
  end

  defp new_sidecar(state, index, {birth, pid}) do
    state = sidecar_gone(state, index)
    # It was started with the role of its predecessor's first day.
    Sidecar.set_role(pid, Fleet.get(state.fleet, index).role)
    seat(state, index, pid: pid, birth: birth, monitor: Process.monitor(pid))
  end

  defp sidecar_gone(state, index) do
    case Fleet.get(state.fleet, index) do
      %{monitor: nil} ->
        state

      %{monitor: monitor} ->
        Process.demonitor(monitor, [:flush])
        state = seat(state, index, pid: nil, monitor: nil)
        sidecar_event(state, index, {:ended, :starting, "its owner process crashed"})
    end
  end

  # News of a seat, for the schedule to know as well.
  defp seat(state, index, news) do
    state |> put_fleet(Fleet.update(state.fleet, index, news)) |> reseat(index)
  end

  defp put_fleet(state, fleet) do
    up? = Fleet.state(fleet, %{}) in [:ready, :busy, :loading]
    :ets.insert(table(state.config[:name]), {:available?, up?})
    %{state | fleet: fleet}
  end

  defp reseat(state, index) do
    seat = Fleet.get(state.fleet, index)
    resident = if seat.heartbeat, do: seat.heartbeat.resident, else: []
    device = seat.ready && seat.ready.device
    news = [open?: Fleet.open?(seat), capacity: seat.capacity, device: device, resident: resident]
    %{state | schedule: Schedule.sidecar(state.schedule, index, news)}
  end

  defp sidecar_event(state, index, {:state, seen}) do
    capacity = seen.heartbeat && seen.heartbeat.capacity
    ready? = Fleet.get(state.fleet, index).ready != nil
    seen = if ready? and capacity, do: Map.put(seen, :capacity, capacity), else: seen
    seat(state, index, seen)
  end

  defp sidecar_event(state, index, {:ready, ready}) do
    state
    |> seat(index,
      state: :ready,
      ready: Map.take(ready, [:device, :device_name, :dtype, :versions, :default_model]),
      catalog: ready.catalog,
      capacity: ready.capacity,
      error: nil
    )
    |> relieve()
    |> start_operations()
  end

  # In order: what it does not finish has cost no life.
  defp sidecar_event(state, index, :stopping), do: seat(state, index, stopping?: true)

  defp sidecar_event(state, index, {:ended, phase, sentence}) do
    seat = Fleet.get(state.fleet, index)
    taken = Schedule.taken(state.schedule, index)
    resting = Schedule.resting(state.schedule, index)
    {running, schedule} = Schedule.lost(state.schedule, index)
    fleet = Fleet.ended(state.fleet, index, phase, sentence)
    state = %{state | schedule: schedule} |> put_fleet(fleet) |> reseat(index) |> relieve()

    state =
      if seat.stopping? do
        Enum.reduce(running, state, &stopped(&2, &1))
      else
        death = death(state, seat, taken, running, resting)
        state = %{state | verdict: Verdict.died(state.verdict, death)}
        Enum.reduce(running, state, &replay(&2, &1, sentence))
      end

    error = Error.new(:unavailable, sentence)
    down? = Fleet.down?(state.fleet)
    state = state.operations |> Operations.lost(index, down?, error) |> answer_operations(state)
    state = drained(state, index)
    if down?, do: fail_all(state), else: state
  end

  defp sidecar_event(state, index, {:message, %{t: :accepted, id: id} = accepted}) do
    if job = running(state, index, id),
      do: put_job(state, %{job | accepted: accepted}),
      else: state
  end

  defp sidecar_event(state, index, {:message, %{t: :progress, id: id} = progress}) do
    case running(state, index, id) do
      %Job{} = job ->
        attempt = Schedule.attempts(state.schedule, id)
        {job, event} = Job.progress(job, progress, attempt, now())

        Telemetry.execute([:request, :progress], Map.take(event, [:step, :steps]), %{
          instance: state.config[:name],
          id: id,
          phase: event.phase,
          image: event.image
        })

        Job.tell(job, {:progress, event})
        put_job(state, job)

      nil ->
        state
    end
  end

  defp sidecar_event(state, index, {:message, %{t: :preview, id: id} = preview}) do
    if job = running(state, index, id) do
      {job, event} = Job.preview(job, preview)
      Job.tell(job, {:preview, event})
      put_job(state, job)
    else
      state
    end
  end

  defp sidecar_event(state, index, {:message, %{t: said, id: id} = image})
       when said in [:image, :result] do
    if job = running(state, index, id),
      do: put_job(state, %{job | images: [image | job.images]}),
      else: state
  end

  defp sidecar_event(state, index, {:message, %{t: :models, models: models}}),
    do: seat(state, index, catalog: models)

  defp sidecar_event(state, index, {:message, %{t: :done, id: id} = done}) do
    cond do
      Operations.known?(state.operations, id) -> operation_done(state, id, index, nil)
      slot?(state, index, id) -> state |> finish_done(index, id, done) |> free(index, id)
      true -> stray(state, id)
    end
  end

  defp sidecar_event(state, index, {:message, %{t: :error, id: id} = error}) do
    cond do
      Operations.known?(state.operations, id) ->
        operation_done(state, id, index, wire_error(error))

      slot?(state, index, id) ->
        job = running(state, index, id)
        state = free(state, index, id)

        cond do
          job == nil ->
            state

          error.kind != "cancelled" ->
            failed(state, job, wire_error(error))

          Schedule.yielding?(state.schedule, id) ->
            yielded(state, job)

          # Not by us: its sidecar shuts down.
          true ->
            failed(state, job, unavailable("the sidecar stopped"))
        end

      true ->
        stray(state, id)
    end
  end

  # A request may have ended on our side, and its id be in use again, while its slot is still taken.
  defp slot?(state, index, id), do: id in Schedule.taken(state.schedule, index)

  defp running(state, index, id) do
    case state.jobs do
      %{^id => %{status: :open} = job} ->
        if Schedule.place(state.schedule, id) == index, do: job

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
    do: drained(%{state | schedule: Schedule.free(state.schedule, index, id)}, index)

  # Tells those who wait for it that a sidecar has nothing to do any more.
  defp drained(state, index) do
    with [_ | _] = waiting <- state.drains[index],
         [] <- Schedule.taken(state.schedule, index) do
      Enum.each(waiting, &GenServer.reply(&1, :ok))
      %{state | drains: Map.delete(state.drains, index)}
    else
      _ -> state
    end
  end

  # A spare takes over from an active sidecar that is gone.
  defp relieve(state) do
    case Fleet.relieve(state.fleet) do
      {:ok, gone, spare, fleet} ->
        %{pid: pid} = seat = Fleet.get(fleet, spare)
        Logger.info("image sidecar #{spare}, which stood by, takes over from #{gone}")
        if gone_pid = Fleet.get(fleet, gone).pid, do: Sidecar.set_role(gone_pid, :standby)
        Sidecar.set_role(pid, :active)

        # Whoever asks for it is not told: a request that needs the model waits for the same load.
        for model <- state.config[:preload],
            do: send_to(seat, %{t: "load_model", id: "preload-#{model_id(model)}", model: model})

        state |> put_fleet(fleet) |> reseat(gone) |> reseat(spare) |> relieve()

      :none ->
        state
    end
  end

  defp model_id(model), do: String.replace(model, "/", ":")

  ## What did not work

  # What there is to know of the death of a sidecar. Requests that had ended on our side, operations, and loads that no
  # request waits for are work, and company, like any other.
  defp death(state, seat, taken, running, resting) do
    now = now()
    models = for id <- running, do: canonical(state, state.jobs[id].model)
    loads = for %{model: model} <- (seat.heartbeat && seat.heartbeat[:loads]) || [], do: model
    also? = Operations.busy?(state.operations, seat.index) or loads -- models != []

    %{
      ran: for(id <- running, do: {id, Job.point(state.jobs[id], now)}),
      alone?: length(taken) == 1 and not also?,
      held: List.wrap(resting),
      at_work?: taken != [] or also?
    }
  end

  # The sidecar is gone under it. The same seed goes out again: it was drawn before the first attempt.
  defp replay(state, id, reason) do
    job = Job.stop_timer(state.jobs[id], :run)

    case Verdict.judge(state.verdict, job.request, reason, now()) do
      {:again, company} ->
        state = %{state | schedule: Schedule.company(state.schedule, id, company)}
        again(state, job, :waiting, :died)

      {:give_up, error, verdict} ->
        Logger.warning("a request is given up: #{error.message}", request_id: id)

        %{state | verdict: verdict}
        |> put_job(job)
        |> finish(id, {:error, error})
        |> suspect(job.request.content)
    end
  end

  # Others of the content of one that was given up are no worse for it, but the rest is spared their company.
  defp suspect(state, content) do
    for {id, %{status: :open, request: %{content: ^content}}} <- state.jobs,
        Verdict.company(state.verdict, id) == :any,
        reduce: state do
      state ->
        verdict = Verdict.suspect(state.verdict, id)
        schedule = Schedule.company(state.schedule, id, :alone)
        %{state | verdict: verdict, schedule: schedule}
    end
  end

  defp stopped(state, id),
    do: again(state, Job.stop_timer(state.jobs[id], :run), :waiting, :stopped)

  # It made room for an interactive one.
  defp yielded(state, job), do: again(state, Job.stop_timer(job, :run), :waiting, :yielded)

  defp failed(state, job, error) do
    job = Job.stop_timer(job, :run)
    fallbacks = fallbacks(state, job)
    facts = %{retries: job.retries, left: job.deadline - now(), fallbacks: fallbacks}

    case Verdict.failed(state.verdict, error, facts) do
      {:retry, pause} ->
        job = Job.start_timer(%{job | retries: job.retries + 1}, :retry, pause)
        again(state, job, :aside, :failed)

      {:fallback, model, rest} ->
        named = if job.model, do: "Model #{job.model}", else: "The default model"
        note = "#{named} could not be used (#{error.message}): #{model} drew this instead."
        job = %{job | model: model, fallbacks: rest, retries: 0, notices: job.notices ++ [note]}
        state = %{state | schedule: Schedule.use_model(state.schedule, job.request.id, model)}
        again(state, job, :waiting, :failed)

      :give_up ->
        state |> put_job(job) |> finish(job.request.id, {:error, error})
    end
  end

  # What is left of the list in the card of the model that was asked for.
  defp fallbacks(_state, %{request: %{fallback: false}}), do: []
  defp fallbacks(_state, %{fallbacks: [_ | _] = rest}), do: rest
  defp fallbacks(_state, %{fallbacks: []}), do: []

  defp fallbacks(state, job) do
    card = Fleet.card(state.fleet, canonical(state, job.model))
    (card && card.fallbacks) || []
  end

  defp again(state, job, place, reason) do
    id = job.request.id
    state = state |> put_job(Job.reset(job)) |> outlived(job)
    verdict = if reason == :died, do: state.verdict, else: Verdict.call_off(state.verdict, id)
    schedule = Schedule.return(state.schedule, id, place, reason)
    state = %{state | verdict: verdict, schedule: schedule}

    Telemetry.execute([:request, :again], %{attempts: Schedule.attempts(state.schedule, id)}, %{
      instance: state.config[:name],
      id: id,
      reason: reason
    })

    tell_queued(state, id)
  end

  # The application has seen the end of the attempt, so it did not end with it.
  defp outlived(state, %{request: %{id: id, durable: true}, ends: ends}) do
    Journal.attempt(state.journal, id, ends)
    state
  end

  defp outlived(state, _job), do: state

  defp fail_all(state) do
    error = unavailable(Fleet.reason(state.fleet))
    # What is on disk can wait for better times, until its deadline.
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
        result = Job.result(job, done, Schedule.attempts(state.schedule, id))

        verdict =
          if match?({:ok, _}, result),
            do: Verdict.done(state.verdict, job.request, now()),
            else: state.verdict

        state = %{state | schedule: Schedule.measure(state.schedule, index, run_ms, load_ms)}
        finish(%{state | verdict: verdict}, id, result)
    end
  end

  # Ends a request on our side at once. If it runs, its slot stays taken until the sidecar confirms.
  defp abandon(state, id, error) do
    with index when is_integer(index) <- Schedule.place(state.schedule, id),
         true <- slot?(state, index, id),
         do: send_to(Fleet.get(state.fleet, index), %{t: "cancel", id: id})

    finish(state, id, {:error, error})
  end

  defp finish(state, id, result) do
    case state.jobs do
      %{^id => %{status: status} = job} when status in [:open, :journaling] ->
        job = Job.stop_timers(job)
        state = disown(state, job.owners)
        # First, so that whoever has the answer finds the event already emitted.
        measure(state, job, result)
        verdict = Verdict.drop(state.verdict, id)
        state = %{state | schedule: Schedule.drop(state.schedule, id), verdict: verdict}
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

  # An owned request was answered to its owner. A submitted one is kept for whoever comes to ask:
  # for a while, and never more than so many.
  defp end_of(state, job) do
    Job.deliver(job, job.result)

    if job.submitted? do
      job = %{job | status: :finished, waiters: [], subscribers: [], cancellers: []}
      remember(state, job, state.config[:result_ttl])
    else
      %{state | jobs: Map.delete(state.jobs, job.request.id)}
    end
  end

  defp remember(state, job, ttl) do
    serial = state.serial + 1
    # Who asks for the same again is known by the digest of it.
    request = %{job.request | image: nil, images: nil, mask: nil}
    job = %{job | serial: serial, request: request, progress: %{}, previews: %{}}
    job = Job.start_timer(job, :forget, ttl)

    drop_oldest(%{
      state
      | serial: serial,
        jobs: Map.put(state.jobs, job.request.id, job),
        finished: :gb_sets.add({serial, job.request.id}, state.finished),
        result_bytes: state.result_bytes + Job.bytes(job)
    })
  end

  defp drop_oldest(state) do
    if :gb_sets.size(state.finished) > state.config[:max_results] or
         (state.result_bytes > state.config[:max_result_bytes] and
            not :gb_sets.is_empty(state.finished)) do
      {_, id} = :gb_sets.smallest(state.finished)
      state |> forget(state.jobs[id]) |> drop_oldest()
    else
      state
    end
  end

  defp forget(state, %{request: %{id: id, durable: durable?}} = job) do
    if durable?, do: Journal.forget(state.journal, id)
    drop(state, job)
  end

  defp drop(state, %{request: %{id: id}} = job) do
    Job.stop_timers(job)
    # Those for whom it was just read.
    Job.deliver(job, {:error, unknown_id()})

    %{
      state
      | jobs: Map.delete(state.jobs, id),
        finished: :gb_sets.del_element({job.serial, id}, state.finished),
        result_bytes: state.result_bytes - Job.bytes(job)
    }
  end

  # The result of a request that was finished before this start is on disk only. Others do not wait for its reading.
  defp read(state, %{reading?: true} = job), do: put_job(state, job)

  defp read(state, %{serial: serial, request: %{id: id}} = job) do
    reader = spawn_link(__MODULE__, :read_result, [self(), state.journal, id, serial])
    put_job(put_in(state.readers[reader], id), %{job | reading?: true})
  end

  @doc false
  def read_result(queue, journal, id, serial),
    do: send(queue, {:stored, id, serial, Journal.result(journal, id)})

  # Also one that was killed, as who waits in code that is loaded anew twice: somebody else reads.
  defp reader_ended(state, reader, reason) do
    {id, readers} = Map.pop(state.readers, reader)
    state = %{state | readers: readers}

    case state.jobs do
      %{^id => %{reading?: true} = job} when reason != :normal ->
        read(state, %{job | reading?: false})

      _ ->
        state
    end
  end

  defp stored(state, job, {:ok, result}), do: told(state, job, result)
  defp stored(state, job, {:error, why}), do: told(state, job, {:error, unavailable(why)})

  # Its files were damaged on the disk since the start: it is drawn again.
  defp stored(state, job, {:unfinished, unfinished}) do
    waiting = Map.take(job, [:waiters, :subscribers])
    state = state |> drop(%{job | waiters: [], subscribers: []}) |> recover_unfinished(unfinished)

    case state.jobs[job.request.id] do
      nil ->
        Job.deliver(job, {:error, unknown_id()})
        state

      again ->
        state = put_job(state, Map.merge(again, waiting))
        if again.status == :open, do: tell_queued(state, job.request.id), else: state
    end
  end

  defp told(state, job, result) do
    Job.deliver(job, result)
    put_job(state, %{job | reading?: false, waiters: [], subscribers: []})
  end

  defp measure(state, job, result) do
    {images, outcome} =
      case result do
        {:ok, images} -> {images, :ok}
        {:error, error} -> {[], error.kind}
      end

    waited = (job.dispatched_at || now()) - job.submitted_at
    total = now() - job.submitted_at
    attempts = Schedule.attempts(state.schedule, job.request.id)
    seat = Fleet.get(state.fleet, Schedule.place(state.schedule, job.request.id))
    model = (job.accepted && job.accepted.model) || canonical(state, job.model)

    RequestLog.ended(job, outcome,
      model: model,
      queue_ms: waited,
      total_ms: total,
      attempts: attempts,
      memory: seat && seat.heartbeat
    )

    Telemetry.execute(
      [:request, :stop],
      %{
        duration: native(total),
        queue_duration: native(waited),
        bytes: Enum.sum(Enum.map(images, &byte_size(Result.data(&1)))),
        images: length(images)
      },
      %{
        instance: state.config[:name],
        id: job.request.id,
        model: (job.accepted && job.accepted.model) || job.request.model,
        result: outcome,
        attempts: attempts
      }
    )
  end

  ## Waiters and subscribers

  defp await(state, id, from) do
    case state.jobs[id] do
      %{status: :finished, result: {:stored, _}} = job ->
        read(state, %{job | waiters: [from | job.waiters]})

      %{status: :finished} = job ->
        GenServer.reply(from, job.result)
        state

      job ->
        put_job(state, %{job | waiters: [from | job.waiters]})
    end
  end

  # A subscriber is `{:process, pid}` or, for a stream, `{:alias, reference}`. Whoever comes late is told how
  # things stand, so that a page that was loaded again goes on where it was.
  defp subscribe(state, id, subscriber) do
    case state.jobs[id] do
      %{status: :finished, result: {:stored, _}} = job ->
        read(state, %{job | subscribers: Enum.uniq([subscriber | job.subscribers])})

      %{status: :finished} = job ->
        Job.deliver(%{job | subscribers: [subscriber]}, job.result)
        state

      job ->
        state = put_job(state, %{job | subscribers: Enum.uniq([subscriber | job.subscribers])})

        if is_integer(Schedule.place(state.schedule, id)) do
          Job.catch_up(job, subscriber)
          state
        else
          late = %{job | subscribers: [subscriber]}
          if job.status != :ending, do: Job.tell(late, queued(state, id))
          tell_positions_soon(state)
        end
    end
  end

  defp queued(state, id) do
    position = Schedule.position(state.schedule, id)

    {:queued,
     %{
       position: position,
       attempt: Schedule.attempts(state.schedule, id) + 1,
       estimated_start_ms: Schedule.wait_ms(state.schedule, position)
     }}
  end

  defp tell_queued(state, id) do
    case state.jobs[id] do
      %{subscribers: []} ->
        state

      job ->
        {:queued, %{position: position}} = event = queued(state, id)
        Job.tell(job, event)
        state |> put_job(%{job | told: position}) |> tell_positions_soon()
    end
  end

  # Those who watch a request that waits see it come closer, once a second.
  defp tell_positions_soon(%{telling_positions?: true} = state), do: state

  defp tell_positions_soon(state) do
    Process.send_after(self(), :tell_positions, @positions_ms)
    %{state | telling_positions?: true}
  end

  defp tell_positions(state) do
    watched =
      for {id, position} <- Enum.with_index(Schedule.order(state.schedule), 1),
          %{subscribers: [_ | _]} = job <- [state.jobs[id]],
          do: {job, position}

    state =
      for {%{told: told} = job, position} <- watched, told != position, reduce: state do
        state -> tell_queued(state, job.request.id)
      end

    if watched == [], do: state, else: tell_positions_soon(state)
  end

  defp put_job(state, job), do: %{state | jobs: Map.put(state.jobs, job.request.id, job)}

  defp update_job(state, id, fun) do
    case state.jobs do
      %{^id => job} -> put_job(state, fun.(job))
      _ -> state
    end
  end

  ## Operations on models

  defp start_operations(state) do
    at_work = Fleet.at_work(state.fleet)
    {messages, operations} = Operations.begin(state.operations, Enum.map(at_work, & &1.index))
    for message <- messages, seat <- at_work, do: send_to(seat, message)
    %{state | operations: operations}
  end

  defp operation_done(state, id, index, error),
    do: state.operations |> Operations.done(id, index, error) |> answer_operations(state)

  defp answer_operations({answers, operations}, state) do
    for {from, answer} <- answers, do: GenServer.reply(from, answer)
    %{state | operations: operations}
  end

  ## Status

  defp status(state) do
    taken = Schedule.taken(state.schedule)

    %{
      state: Fleet.state(state.fleet, taken),
      error: Fleet.error(state.fleet),
      default_model: state.config[:default_model],
      sidecars: Fleet.statuses(state.fleet, taken),
      journal:
        state.journal && %{usable?: state.journal_problem == nil, error: state.journal_problem},
      queue: Schedule.status(state.schedule)
    }
  end

  # Answers those who wait for the outcome of a start, once there is one.
  defp settle(%{awaiting_start: []} = state), do: state

  defp settle(state) do
    case Fleet.state(state.fleet, Schedule.taken(state.schedule)) do
      undecided when undecided in [:starting, :stalled] -> state
      closed when closed in [:disabled, :down] -> settle(state, {:error, closed(state)})
      _up -> settle(state, :ok)
    end
  end

  defp settle(state, answer) do
    Enum.each(state.awaiting_start, &GenServer.reply(&1, answer))
    %{state | awaiting_start: []}
  end

  ## Errors

  # Why nothing is taken in at all, or nil.
  defp closed(state) do
    case Fleet.state(state.fleet, %{}) do
      :disabled ->
        Error.new(:disabled, "image generation is disabled in this application's configuration")

      :down ->
        unavailable(Fleet.reason(state.fleet))

      _ ->
        nil
    end
  end

  defp not_kept(why),
    do: Error.new(:unavailable, "the request cannot be kept on disk: #{why}")

  defp unavailable(reason),
    do: Error.new(:unavailable, "image generation is not available: #{reason}")

  defp overloaded(state, ms) do
    queued = Schedule.waiting(state.schedule)

    Error.new(:overloaded, "the queue is full (#{queued} requests wait): try again later", %{
      retry_after_ms: ms
    })
  end

  defp rate_limited(ms) do
    message =
      "too many requests: try again in #{:erlang.float_to_binary(ms / 1000 + 0.05, decimals: 1)} s"

    Error.new(:rate_limited, message, %{retry_after_ms: ms})
  end

  defp cancelled, do: Error.new(:cancelled, "the request was cancelled")

  defp conflict do
    Error.new(:invalid_request, "id is that of another request, with other content", %{
      field: :id,
      conflict: true
    })
  end

  defp unknown_id, do: invalid(:id, "no request has this id, or it ended too long ago")

  defp invalid(field, message), do: Error.new(:invalid_request, message, %{field: field})

  defp wire_error(error) do
    kind = Enum.find(Error.kinds(), :internal, &(Atom.to_string(&1) == error.kind))

    field =
      error.field &&
        Enum.find(Map.keys(Request.__struct__()), &(Atom.to_string(&1) == error.field))

    answer = Error.new(kind, error.message, if(field, do: %{field: field}, else: %{}))
    if error.retryable == nil, do: answer, else: %{answer | retryable?: error.retryable}
  end

  defp native(ms), do: System.convert_time_unit(ms, :millisecond, :native)
  defp now, do: System.monotonic_time(:millisecond)
end
