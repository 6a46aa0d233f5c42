defmodule StarweaveImage.Sidecar do
  @moduledoc false
  # Owns one Python process: starts it, speaks docs/protocol.md with it, judges its health, ends it,
  # and starts the next one. What is asked of it and what it finds out go to and from the queue, which
  # owns the requests; nothing that must survive the Python process lives here.
  #
  # This process never blocks on the port while work runs: writes are `nosuspend` with a queue of their
  # own, because both `Port.command/2` and sending to a port suspend the caller when the child does not read.

  use GenServer
  use StarweaveImage.CrashLog
  require Logger

  alias StarweaveImage.{Backoff, Config, Environment, Telemetry}
  alias StarweaveImage.Sidecar.{Answers, Log, Wire}
  alias StarweaveImage.Sidecar.{Health, Python}

  @tick_ms 250
  @retry_write_ms 5
  # Between the polite signal and the kill, when the grace period is over.
  @term_ms 1_500
  # For its log to be read to the end, once nobody is left to write to it.
  @last_words_ms 1_000
  # After a crash of a sidecar that had worked, starts in a row may cost so much before the accepted requests fail: what each
  # one that failed costs, and one that somebody else killed, which says little of whether a start can succeed.
  @patience 9
  @failed 3
  @killed 1
  # A start that reaches `ready` and stays up this long is a good one: the back-off begins anew.
  @stable_ms 30_000
  # A tick that comes later than this says that this process, and maybe all of the machine, stood still.
  @late_ms 1_000
  @log_over Log.over()

  defstruct [
    :config,
    :index,
    :role,
    :queue,
    # Larger than that of any owner before, by which the queue knows who is the present one.
    :birth,
    :python,
    :log,
    :started_at,
    :start_by,
    :ready_at,
    :heard_at,
    :ticked_at,
    :heartbeat,
    # Why the start that goes on fails, by its own words; why the process is to be killed; what the log says already.
    :failure,
    :condemned,
    :told,
    slept: 0,
    generation: 0,
    phase: :starting,
    ever_ready: false,
    # What the starts since the last one that reached `ready` cost; and the starts that count for the back-off, which one
    # that is good but short is one of.
    spent_patience: 0,
    failed_starts: 0,
    buffer: nil,
    outbox: :queue.new(),
    answers: nil,
    asked: %{},
    # Those among them that were told to stop.
    told_to_stop: %{}
  ]

  @typedoc "A standby has everything imported and nothing loaded, until its queue makes it active."
  @type role :: :active | :standby

  def start_link({_index, _config, _role} = start), do: GenServer.start_link(__MODULE__, start)

  @doc "Says what the sidecar is from now on: a standby starts without preloading anything."
  @spec set_role(pid, role) :: :ok
  def set_role(sidecar, role) when role in [:active, :standby],
    do: GenServer.cast(sidecar, {:role, role})

  @doc "Sends a message of the protocol to the Python process of this generation; late ones are dropped."
  @spec send_message(pid, pos_integer, map) :: :ok
  def send_message(sidecar, generation, message),
    do: GenServer.cast(sidecar, {:send, generation, message})

  @impl true
  def init({index, config, role}) do
    # Killing a child that has output queued can send this process an `:epipe` exit.
    Process.flag(:trap_exit, true)
    birth = System.unique_integer([:monotonic])

    state = %__MODULE__{
      config: config,
      index: index,
      role: role,
      queue: config[:name],
      birth: birth
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

  # What it says, once it is to be killed, is not to be trusted.
  @impl true
  def handle_info({port, {:data, _}}, %{python: %{port: port}, condemned: reason} = state)
      when reason != nil,
      do: {:noreply, state}

  def handle_info({port, {:data, bytes}}, %{python: %{port: port}} = state) do
    case Wire.feed(state.buffer, bytes) do
      {:ok, bodies, buffer} -> {:noreply, receive_bodies(%{state | buffer: buffer}, bodies)}
      {:error, reason} -> {:noreply, fail(state, "it sent #{reason}")}
    end
  end

  def handle_info({port, {:exit_status, status}}, %{python: %{port: port}} = state),
    do:
      {:noreply,
       ended(
         state,
         state.condemned || state.failure || Python.exit_reason(status),
         cost(state, status)
       )}

  # Instead of an exit status: the write of what was queued found nobody to read it.
  def handle_info({:EXIT, port, _reason}, %{python: %{port: port}} = state) do
    sentence =
      if state.ready_at,
        do: "the Python process stopped reading and ended",
        else: "the Python process ended as it was started: run `mix image.setup` and see the log"

    {:noreply, ended(state, state.condemned || sentence)}
  end

  # What Python and its libraries print would fail from now on, in the middle of a request.
  def handle_info({:EXIT, reader, reason}, %{log: %{reader: reader}, condemned: nil} = state)
      when reason != @log_over,
      do: {:noreply, fail(state, "the reader of its log has ended")}

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

  # What is left of a port that was closed, and the ends of the log readers.
  def handle_info(_message, state), do: {:noreply, state}

  @impl true
  def terminate(_reason, %{python: nil}), do: :ok

  def terminate(_reason, state) do
    grace = state.config[:shutdown_grace]

    # So that it is sent nothing more, and that what it does not finish is no attempt that cost a life.
    tell(state, :stopping)
    # One that is down has none.
    reader = if state.log, do: Process.monitor(state.log.reader)

    state
    |> push(%{t: "shutdown", g: state.generation, grace_ms: grace})
    |> drain(now() + grace)
    |> close()

    # What stops after us may be Logger: the last words come first.
    if reader do
      receive do
        {:DOWN, ^reader, _, _, _} -> :ok
      after
        @last_words_ms -> :ok
      end
    end
  end

  # What runs may come to its end within the grace period, and then its answer counts.
  defp drain(%{python: nil} = state, _deadline), do: state

  defp drain(%{python: %{port: port} = python} = state, deadline) do
    receive do
      {^port, {:data, _}} = data ->
        {:noreply, state} = handle_info(data, state)
        drain(state, deadline)

      {:retry_write, _} ->
        drain(flush(state), deadline)

      # One that hangs does not get all of a long grace period.
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
        failure: nil,
        condemned: nil,
        # Once down, it is down until a start succeeds: callers get their answer at once meanwhile.
        phase: if(state.phase == :down, do: :down, else: :starting),
        buffer: Wire.new(),
        outbox: :queue.new(),
        answers: Answers.new(),
        asked: %{},
        told_to_stop: %{}
    }

    case launch(state) do
      {:ok, python, log} ->
        Telemetry.execute([:sidecar, :start], %{system_time: System.system_time()}, %{
          instance: state.config[:name],
          index: state.index,
          generation: state.generation,
          os_pid: python.os_pid
        })

        state = %{state | python: python, log: log}
        report(state, state.phase)
        state

      {:error, sentence} ->
        ended(state, sentence)
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
    # A start may fail for reasons that nobody thought of, and the application may not.
    error ->
      sentence =
        "it could not be started, by a fault of this library (#{inspect(error.__struct__)})"

      if state.told != sentence,
        do: Logger.error(Exception.format(:error, error, __STACKTRACE__))

      {:error, sentence}
  end

  defp hello(state) do
    # A spare loads nothing.
    config = if state.role == :active, do: state.config, else: [preload: []] ++ state.config
    %{t: "hello", v: Wire.version(), g: state.generation, config: Config.to_wire(config)}
  end

  ## What the Python process says

  defp receive_bodies(state, []), do: state
  # A body handled before this one ended the process.
  defp receive_bodies(%{python: nil} = state, _bodies), do: state
  defp receive_bodies(%{condemned: reason} = state, _bodies) when reason != nil, do: state

  defp receive_bodies(state, [body | rest]) do
    case Wire.decode(body) do
      {:ok, message} ->
        state |> receive_message(message) |> receive_bodies(rest)

      {:error, reason} ->
        fail(state, "it sent #{reason}")
    end
  end

  defp receive_message(state, %{t: :heartbeat, g: g} = beat) when g in [0, state.generation] do
    # Greeted at its first sign of life: a write to one that has ended already would cost its exit status.
    state = if state.heartbeat, do: state, else: push(state, hello(state))
    known = state.heartbeat && state.heartbeat.resident
    state = listed(%{state | heard_at: awake(state), heartbeat: beat})

    Telemetry.execute(
      [:sidecar, :heartbeat],
      %{rss: beat.rss, running: length(beat.running), grant: beat.grant},
      %{
        instance: state.config[:name],
        index: state.index,
        generation: state.generation,
        phase: beat.phase
      }
    )

    cond do
      reason =
          Health.stuck(beat, state.config) ||
            Health.outstays(beat, state.told_to_stop, awake(state), state.config) ->
        fail(%{state | phase: :stalled}, reason)

      state.ready_at ->
        # One that was written as it got ready may come just after `ready`.
        report(state, if(beat.phase == :starting, do: :ready, else: beat.phase))
        if beat.resident != known, do: ask_for_models(state), else: state

      true ->
        report(state, state.phase)
        state
    end
  end

  defp receive_message(%{generation: g} = state, %{t: :ready, g: g} = ready) do
    if ready.v == Wire.version() do
      took = now() - state.started_at

      Logger.info(
        "#{label(state)} is ready after #{took} ms on #{ready.device} " <>
          "(#{ready.device_name}), #{ready.dtype}"
      )

      Telemetry.execute(
        [:sidecar, :ready],
        %{duration: System.convert_time_unit(took, :millisecond, :native)},
        %{
          instance: state.config[:name],
          index: state.index,
          generation: g,
          os_pid: state.python.os_pid,
          device: ready.device,
          dtype: ready.dtype
        }
      )

      # The silence of its imports ends here, not with the next heartbeat.
      state = %{state | ready_at: now(), heard_at: awake(state), ever_ready: true, phase: :ready}
      state = %{state | told: nil}
      tell(state, {:ready, ready})
      state
    else
      fail(state, "it speaks version #{ready.v} of the protocol")
    end
  end

  # What it says before it knows its generation, such as what is wrong with `hello`, has a 0 in its place.
  defp receive_message(state, %{t: :error, g: g, id: nil} = error)
       when g in [0, state.generation] do
    message = Log.printable_lines(error.message)
    Logger.log(if(state.told == message, do: :debug, else: :error), "#{label(state)}: #{message}")
    # Before `ready`, this is why it cannot start.
    if state.ready_at, do: state, else: %{state | failure: message}
  end

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
        fail(state, reason)
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

  # A process may be alive and well and yet not know of a request: it reads nothing, or forgot it. So
  # what it was asked must be in its heartbeats, from soon after until it is answered.
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

  # By a name that no request has.
  defp ask_for_models(state) do
    id = "models:" <> Base.encode16(:crypto.strong_rand_bytes(12), case: :lower)
    message = %{t: "models", g: state.generation, id: id}
    state |> ask(message) |> push(message)
  end

  ## Health

  defp check(state) do
    awake = awake(state)
    config = state.config

    # The import of a large library may hold the interpreter for long, and the heartbeat with it.
    importing? = is_nil(state.ready_at) and state.heartbeat != nil

    cond do
      state.condemned ->
        execute(state)

      not importing? and awake - state.heard_at > config[:heartbeat_timeout] ->
        fail(%{state | phase: :stalled}, "no heartbeat for #{awake - state.heard_at} ms")

      is_nil(state.ready_at) and awake > state.start_by ->
        fail(state, "it was not ready after #{config[:start_timeout]} ms")

      Enum.any?(state.asked, fn {_, at} -> awake - at > config[:heartbeat_timeout] end) ->
        fail(%{state | phase: :stalled}, "it does not work on what it was asked")

      state.ready_at && state.failed_starts > 0 && now() - state.ready_at > @stable_ms ->
        %{state | failed_starts: 0}

      true ->
        state
    end
  end

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

  ## The end

  # Kills at once. By the process group, before the port is closed: closing first would hang for
  # ever on output that a stuck child does not read.
  defp fail(state, reason) do
    Logger.error("#{label(state)} (generation #{state.generation}) is killed: #{reason}")
    report(state, state.phase)
    execute(%{state | condemned: reason})
  end

  # Where no descriptor is left to run a command with, the next tick tries again.
  defp execute(state) do
    case Python.kill(state.python) do
      :ok -> ended(state, state.condemned)
      :error -> state
    end
  end

  # SIGKILL or SIGTERM, and not by us.
  defp cost(%{condemned: nil, failure: nil}, status) when status in [128 + 9, 128 + 15],
    do: @killed

  defp cost(_state, _status), do: @failed

  defp ended(state, sentence, cost \\ @failed) do
    good? = state.ready_at != nil
    failed_starts = if good?, do: state.failed_starts, else: state.failed_starts + 1
    # A first restart after a good start is at once; from then on each one waits longer.
    pause = Backoff.pause(failed_starts, {state.config[:backoff_min], state.config[:backoff_max]})
    failed_starts = if good?, do: failed_starts + 1, else: failed_starts
    spent_patience = if good?, do: 0, else: state.spent_patience + cost

    phase =
      cond do
        good? -> :starting
        state.ever_ready and spent_patience < @patience and state.phase != :down -> :starting
        true -> :down
      end

    log_end(state, sentence, pause)
    Process.send_after(self(), {:restart, state.generation}, pause)

    state = %{
      close(state)
      | phase: phase,
        told: if(good?, do: nil, else: sentence),
        failed_starts: failed_starts,
        spent_patience: spent_patience
    }

    tell(state, {:ended, phase, sentence})
    state
  end

  # A start that fails as the one before it is no news.
  defp log_end(state, sentence, pause) do
    level = if state.told == sentence, do: :debug, else: :warning
    did = if state.python, do: "ended", else: "cannot start"
    Logger.log(level, "#{label(state)} #{did}: #{sentence}; next start in #{pause} ms")

    if state.python do
      Telemetry.execute(
        [:sidecar, :stop],
        %{
          duration: System.convert_time_unit(now() - state.started_at, :millisecond, :native)
        },
        %{
          instance: state.config[:name],
          index: state.index,
          generation: state.generation,
          os_pid: state.python.os_pid,
          reason: sentence
        }
      )
    end
  end

  # Also after a clean exit: whoever the process forked and left behind is in its group.
  defp close(state) do
    if state.python, do: Python.close(state.python)
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

  defp label(%{role: :standby, index: index}), do: "image sidecar #{index} (standby)"
  defp label(%{index: index}), do: "image sidecar #{index}"

  defp now, do: System.monotonic_time(:millisecond)

  # A clock that stands still while this process does: what came in the meantime has not been read yet.
  defp awake(state), do: now() - state.slept
end
