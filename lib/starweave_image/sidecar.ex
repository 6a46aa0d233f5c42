defmodule StarweaveImage.Sidecar do
  @moduledoc false
  # Owns one Python process: starts it, exchanges the messages of docs/protocol.md with it, checks its health, ends it,
  # and starts the next one. Requests come from the queue, which owns them, and results go back to it; no state that
  # must survive the Python process is kept here.
  #
  # This process never blocks on the port while work runs. Both `Port.command/2` and sending to a port suspend the
  # caller while the child does not read, so writes are `nosuspend` and wait in an outbox.

  use GenServer
  use StarweaveImage.CrashLog
  require Logger

  alias StarweaveImage.{Config, Environment, Telemetry}
  alias StarweaveImage.Sidecar.{Answers, Health, Life, Log, Python, Wire}

  @tick_ms 250
  @retry_write_ms 5
  # From SIGTERM, sent after the grace period, to SIGKILL.
  @term_ms 1_500
  # How long to wait for the rest of the log after the Python process has ended.
  @last_words_ms 1_000
  # A process that stays ready this long counts as stable, which resets the back-off.
  @stable_ms 30_000
  # A tick that is later than this means that this process, and maybe the whole machine, was suspended.
  @late_ms 1_000
  @log_over Log.over()
  # Exit statuses of a SIGKILL or SIGTERM that this process did not send.
  @killed [128 + 9, 128 + 15]

  defstruct [
    :config,
    :index,
    :role,
    :queue,
    # Larger than that of every earlier owner, so that the queue can tell the present one.
    :birth,
    :life,
    :python,
    :log,
    :started_at,
    :start_by,
    :ready_at,
    :heard_at,
    :ticked_at,
    :heartbeat,
    # How long this process itself was suspended, in ms.
    slept: 0,
    generation: 0,
    buffer: nil,
    outbox: :queue.new(),
    answers: nil,
    # Request id → since when its entry in the heartbeats is due.
    asked: %{},
    # Request id → when it was told to stop.
    told_to_stop: %{}
  ]

  @typedoc "A standby has everything imported and nothing loaded, until its queue makes it active."
  @type role :: :active | :standby

  def start_link({_index, _config, _role} = start), do: GenServer.start_link(__MODULE__, start)

  @doc "Sets the sidecar's role: a standby starts without preloading anything."
  @spec set_role(pid, role) :: :ok
  def set_role(sidecar, role) when role in [:active, :standby],
    do: GenServer.cast(sidecar, {:role, role})

  @doc "Sends a message to the Python process of this generation; a message for an earlier generation is dropped."
  @spec send_message(pid, pos_integer, map) :: :ok
  def send_message(sidecar, generation, message),
    do: GenServer.cast(sidecar, {:send, generation, message})

  @impl true
  def init({index, config, role}) do
    # Killing a child while output to it is queued can send this process an `:epipe` exit.
    Process.flag(:trap_exit, true)
    birth = System.unique_integer([:monotonic])

    state = %__MODULE__{
      config: config,
      index: index,
      role: role,
      queue: config[:name],
      birth: birth,
      life: Life.new({config[:backoff_min], config[:backoff_max]})
    }

    {:ok, state, {:continue, :start}}
  end

  @impl true
  def handle_continue(:start, state), do: {:noreply, start(state)}

  @impl true
  def handle_cast({:send, generation, message}, %{generation: generation, python: python} = state)
      when python != nil,
      do: {:noreply, state |> ask(message) |> push(message)}

  def handle_cast({:send, _generation, _message}, state), do: {:noreply, state}

  def handle_cast({:role, role}, %{role: role} = state), do: {:noreply, state}

  def handle_cast({:role, role}, state) do
    Logger.info("image sidecar #{state.index} is #{role} now")
    {:noreply, %{state | role: role}}
  end

  # Messages of a condemned process are ignored.
  @impl true
  def handle_info(
        {port, {:data, _}},
        %{python: %{port: port}, life: %{state: :condemned}} = state
      ),
      do: {:noreply, state}

  def handle_info({port, {:data, bytes}}, %{python: %{port: port}} = state) do
    case Wire.feed(state.buffer, bytes) do
      {:ok, bodies, buffer} -> {:noreply, receive_bodies(%{state | buffer: buffer}, bodies)}
      {:error, reason} -> {:noreply, condemn(state, :fails, "it sent #{reason}")}
    end
  end

  def handle_info({port, {:exit_status, status}}, %{python: %{port: port}} = state) do
    how = if status in @killed, do: :killed, else: :otherwise
    {:noreply, live(state, {:ended, Python.exit_reason(status), how})}
  end

  # Arrives instead of an exit status if a queued write failed because the reader was gone.
  def handle_info({:EXIT, port, _reason}, %{python: %{port: port}} = state) do
    sentence =
      if state.life.ready?,
        do: "the Python process stopped reading and ended",
        else: "the Python process ended as it was started: run `mix image.setup` and see the log"

    {:noreply, live(state, {:ended, sentence, :otherwise})}
  end

  # Without a log reader, every print of Python and its libraries would fail, in the middle of a request.
  def handle_info({:EXIT, reader, reason}, %{log: %{reader: reader}} = state)
      when reason != @log_over,
      do: {:noreply, condemn(state, :fails, "the reader of its log has ended")}

  def handle_info(:tick, state) do
    Process.send_after(self(), :tick, @tick_ms)
    now = now()
    late = now - state.ticked_at - @tick_ms
    state = %{state | ticked_at: now, slept: state.slept + if(late > @late_ms, do: late, else: 0)}
    {:noreply, if(state.python, do: check(state), else: state)}
  end

  def handle_info({:restart, generation}, %{generation: generation, python: nil} = state),
    do: {:noreply, start(state)}

  def handle_info({:retry_write, generation}, %{generation: generation} = state),
    do: {:noreply, flush(state)}

  # Late messages of a closed port, and normal exits of log readers.
  def handle_info(_message, state), do: {:noreply, state}

  @impl true
  def terminate(_reason, %{python: nil}), do: :ok

  def terminate(_reason, state) do
    grace = state.config[:shutdown_grace]

    # The queue then sends no more requests, and does not blame the unfinished ones for the end of this process.
    tell(state, :stopping)
    # A sidecar that is down has no log reader.
    reader = if state.log, do: Process.monitor(state.log.reader)

    state
    |> push(%{t: "shutdown", g: state.generation, grace_ms: grace})
    |> drain(now() + grace)
    |> close("it was told to stop")

    # Logger may stop right after this process, so wait until the last log lines have been read.
    if reader do
      receive do
        {:DOWN, ^reader, _, _, _} -> :ok
      after
        @last_words_ms -> :ok
      end
    end
  end

  # Running requests may finish within the grace period; their answers still count.
  defp drain(%{python: nil} = state, _deadline), do: state

  defp drain(%{python: %{port: port} = python} = state, deadline) do
    receive do
      {^port, {:data, _}} = data ->
        {:noreply, state} = handle_info(data, state)
        drain(state, deadline)

      {:retry_write, _} ->
        drain(flush(state), deadline)

      # A process that hangs is killed before a long grace period is over.
      :tick ->
        {:noreply, state} = handle_info(:tick, state)
        drain(state, deadline)

      {^port, {:exit_status, _}} ->
        state

      {:EXIT, ^port, _} ->
        state
    after
      max(deadline - now(), 0) ->
        _ = Python.signal(python, "TERM")
        _ = Python.ended?(python, @term_ms) || Python.kill(python)
        state
    end
  end

  ## The start

  defp start(%{generation: 0} = state) do
    Process.send_after(self(), :tick, @tick_ms)
    open(%{state | generation: 1, ticked_at: now()})
  end

  defp start(state), do: open(%{state | generation: state.generation + 1})

  defp open(state) do
    state = %{
      state
      | started_at: now(),
        start_by: awake(state) + state.config[:start_timeout],
        heard_at: awake(state),
        ready_at: nil,
        heartbeat: nil,
        buffer: Wire.new(),
        outbox: :queue.new(),
        answers: Answers.new(),
        asked: %{},
        told_to_stop: %{}
    }

    case launch(state) do
      {:ok, python, log} ->
        emit(state, :start, %{system_time: System.system_time()}, %{os_pid: python.os_pid})
        state = live(%{state | python: python, log: log}, :started)
        report(state, Life.phase(state.life))
        state

      {:error, sentence} ->
        live(state, {:ended, sentence, :otherwise})
    end
  end

  defp launch(%{config: config} = state) do
    with {:ok, interpreter} <- Environment.python(python: config[:python]),
         {:ok, log} <- Log.start_link(config[:name], state.index) do
      case Python.start(interpreter, log.socket, config[:env]) do
        {:ok, python} ->
          {:ok, python, log}

        {:error, sentence} ->
          Log.stop(log)
          {:error, sentence}
      end
    end
  rescue
    # A start may fail for unforeseen reasons, which must not bring down the application.
    error ->
      sentence =
        "it could not be started, by a fault of this library (#{inspect(error.__struct__)})"

      if Life.news?(state.life, sentence),
        do: Logger.error(Exception.format(:error, error, __STACKTRACE__))

      {:error, sentence}
  end

  defp hello(state) do
    # A spare loads nothing.
    config = if state.role == :active, do: state.config, else: [preload: []] ++ state.config
    %{t: "hello", v: Wire.version(), g: state.generation, config: Config.to_wire(config)}
  end

  ## Messages from the Python process

  defp receive_bodies(state, []), do: state
  # A body handled before this one condemned the process or ended it.
  defp receive_bodies(%{life: %{state: over}} = state, _bodies)
       when over in [:resting, :condemned],
       do: state

  defp receive_bodies(state, [body | rest]) do
    case Wire.decode(body) do
      {:ok, message} ->
        state |> receive_message(message) |> receive_bodies(rest)

      {:error, reason} ->
        condemn(state, :fails, "it sent #{reason}")
    end
  end

  defp receive_message(state, %{t: :heartbeat, g: g} = beat) when g in [0, state.generation] do
    state = live(state, :heartbeat)
    known = state.heartbeat && state.heartbeat.resident
    state = listed(%{state | heard_at: awake(state), heartbeat: beat})

    counts = %{rss: beat.rss, running: length(beat.running), grant: beat.grant}
    emit(state, :heartbeat, counts, %{phase: beat.phase})

    cond do
      reason =
          Health.stuck(beat, state.config) ||
            Health.outstays(beat, state.told_to_stop, awake(state), state.config) ->
        condemn(state, :stalls, reason)

      state.life.ready? ->
        # A heartbeat written just before `ready` may arrive after it.
        report(state, if(beat.phase == :starting, do: :ready, else: beat.phase))
        if beat.resident != known, do: ask_for_models(state), else: state

      true ->
        report(state, Life.phase(state.life))
        state
    end
  end

  defp receive_message(%{generation: g} = state, %{t: :ready, g: g} = ready) do
    if ready.v == Wire.version(),
      do: live(state, {:ready, ready}),
      else: condemn(state, :fails, "it speaks version #{ready.v} of the protocol")
  end

  # Messages sent before the process knows its generation, such as an error in `hello`, have generation 0.
  defp receive_message(state, %{t: :error, g: g, id: nil} = error)
       when g in [0, state.generation],
       do: live(state, {:complaint, Log.printable_lines(error.message)})

  defp receive_message(state, %{t: :log} = log) do
    metadata = if log.id, do: [request_id: log.id], else: []
    message = Log.printable_lines(log.message)
    Logger.log(log.level, "#{label(state)}: #{message}", metadata)
    state
  end

  defp receive_message(%{generation: g} = state, %{t: type, g: g} = message)
       when type in ~w(accepted progress preview image result done error models)a do
    case Answers.heard(state.answers, message) do
      {:tell, message, answers} ->
        tell(state, {:message, message})
        answered(%{state | answers: answers}, message)

      {:keep, answers} ->
        %{state | answers: answers}

      :of_nobody ->
        stray(state, message)

      {:error, reason} ->
        condemn(state, :fails, reason)
    end
  end

  defp receive_message(state, message), do: stray(state, message)

  defp stray(state, %{t: :error, terminal: false} = error) do
    Logger.warning("#{label(state)}: #{error.message}", request_id: error.id)
    state
  end

  defp stray(state, message) do
    Logger.debug("#{label(state)}: dropped #{inspect(message.t)}")
    state
  end

  # A live process may still have lost a request, because it reads nothing or forgot it. So each request must be listed
  # in the heartbeats from soon after it was sent until it is answered.
  defp ask(%{asked: asked} = state, %{t: "cancel", id: id}) when is_map_key(asked, id),
    do: %{state | told_to_stop: Map.put_new(state.told_to_stop, id, awake(state))}

  defp ask(state, message) do
    state = %{state | answers: Answers.asked(state.answers, message)}

    if message.t in [:generate, "generate"],
      do: put_in(state.asked[message.id], awake(state)),
      else: state
  end

  defp listed(state) do
    now = awake(state)
    listed = for %{id: id} <- state.heartbeat.running, is_map_key(state.asked, id), do: {id, now}
    %{state | asked: Map.merge(state.asked, Map.new(listed))}
  end

  defp answered(state, %{t: type, id: id} = message) when type in [:done, :error] do
    state = %{
      state
      | asked: Map.delete(state.asked, id),
        told_to_stop: Map.delete(state.told_to_stop, id)
    }

    if message[:kind] == "model_load_failed", do: ask_for_models(state), else: state
  end

  defp answered(state, _message), do: state

  # The id is one that no request can have.
  defp ask_for_models(state) do
    id = "models:" <> Base.encode16(:crypto.strong_rand_bytes(12), case: :lower)
    message = %{t: "models", g: state.generation, id: id}
    state |> ask(message) |> push(message)
  end

  ## Health

  defp check(%{life: %{state: :condemned}} = state), do: act(:kill, state)

  defp check(state) do
    clocks = %{
      now: awake(state),
      heard_at: state.heard_at,
      start_by: state.start_by,
      asked_at: Map.values(state.asked)
    }

    case Health.overdue(state.life.state, clocks, state.config) do
      {judgement, reason} ->
        condemn(state, judgement, reason)

      nil when state.life.state == :ready ->
        if stable?(state), do: live(state, :stable), else: state

      nil ->
        state
    end
  end

  defp stable?(state), do: now() - state.ready_at > @stable_ms

  ## Writing

  defp push(state, message),
    do: flush(%{state | outbox: :queue.in(Wire.frame(message), state.outbox)})

  defp flush(%{python: nil} = state), do: state

  defp flush(state) do
    with {:value, frame} <- :queue.peek(state.outbox),
         true <- :erlang.port_command(state.python.port, frame, [:nosuspend]) do
      flush(%{state | outbox: :queue.drop(state.outbox)})
    else
      :empty ->
        state

      false ->
        Process.send_after(self(), {:retry_write, state.generation}, @retry_write_ms)
        state
    end
  rescue
    # The port is gone; the message that says so is on the way.
    ArgumentError -> state
  end

  ## Transitions of its life

  defp condemn(%{life: %{state: state}} = sidecar, _judgement, _reason)
       when state in [:resting, :condemned],
       do: sidecar

  defp condemn(state, judgement, reason) do
    Logger.error("#{label(state)} (generation #{state.generation}) is killed: #{reason}")
    live(state, {judgement, reason})
  end

  defp live(state, event) do
    {actions, life} = Life.next(state.life, event)
    Enum.reduce(actions, %{state | life: life}, &act/2)
  end

  # Sent only at the first sign of life: after a write to a process that has already ended, its exit status would be
  # lost.
  defp act(:greet, state), do: push(state, hello(state))

  defp act({:announce, ready}, state) do
    took = now() - state.started_at

    Logger.info(
      "#{label(state)} is ready after #{took} ms on #{ready.device} " <>
        "(#{ready.device_name}), #{ready.dtype}"
    )

    facts = %{os_pid: state.python.os_pid, device: ready.device, dtype: ready.dtype}
    emit(state, :ready, %{duration: native(took)}, facts)
    # `ready` also counts as a sign of life: imports may have delayed the last heartbeat.
    state = %{state | ready_at: now(), heard_at: awake(state)}
    tell(state, {:ready, ready})
    state
  end

  defp act({:complain, words, news?}, state) do
    Logger.log(if(news?, do: :error, else: :debug), "#{label(state)}: #{words}")
    state
  end

  # Kills the whole process group before closing the port: closing first would block for ever on output that a stuck
  # child does not read. If no descriptor is free for the kill command, the next tick tries again.
  defp act(:kill, state) do
    report(state, Life.phase(state.life))

    case Python.kill(state.python) do
      :ok -> live(state, {:ended, state.life.sentence, :otherwise})
      :error -> state
    end
  end

  defp act({:rest, sentence, pause, news?}, state) do
    log_end(state, sentence, pause, if(news?, do: :warning, else: :debug))
    Process.send_after(self(), {:restart, state.generation}, pause)
    state = close(state, sentence)
    tell(state, {:ended, Life.phase(state.life), sentence})
    state
  end

  defp log_end(state, sentence, pause, level) do
    did = if state.python, do: "ended", else: "cannot start"
    Logger.log(level, "#{label(state)} #{did}: #{sentence}; next start in #{pause} ms")
  end

  # Needed after a clean exit too: processes that it forked and left behind are in its group.
  defp close(state, sentence) do
    if state.python do
      Python.close(state.python)
      facts = %{os_pid: state.python.os_pid, reason: sentence}
      emit(state, :stop, %{duration: native(now() - state.started_at)}, facts)
    end

    if state.log, do: Log.stop(state.log)
    %{state | python: nil, log: nil}
  end

  ## To the queue

  defp report(state, phase) do
    tell(
      state,
      {:state,
       %{
         state: phase,
         os_pid: state.python && state.python.os_pid,
         uptime_ms: now() - state.started_at,
         heartbeat: state.heartbeat
       }}
    )
  end

  defp tell(state, event) do
    owner = {state.birth, self()}
    GenServer.cast(state.queue, {:sidecar, owner, state.index, state.generation, event})
  end

  defp emit(state, event, measurements, facts) do
    whose = %{instance: state.config[:name], index: state.index, generation: state.generation}
    Telemetry.execute([:sidecar, event], measurements, Map.merge(whose, facts))
  end

  defp label(%{role: :standby, index: index}), do: "image sidecar #{index} (standby)"
  defp label(%{index: index}), do: "image sidecar #{index}"

  defp native(ms), do: System.convert_time_unit(ms, :millisecond, :native)
  defp now, do: System.monotonic_time(:millisecond)

  # A clock that stops while this process is suspended: heartbeats that arrived meanwhile have not been read yet.
  defp awake(state), do: now() - state.slept
end
