defmodule StarweaveImage.Sidecar do
  @moduledoc false
  # Owns one Python process: starts it, speaks docs/protocol.md with it, judges its health, ends it,
  # and starts the next one. What is asked of it and what it finds out go to and from the queue, which
  # owns the requests; nothing that must survive the Python process lives here.
  #
  # This process never blocks on the port while work runs: writes are `nosuspend` with a queue of their
  # own, because both `Port.command/2` and sending to a port suspend the caller when the child does not read.

  use GenServer
  require Logger

  alias StarweaveImage.{Environment, SidecarLog, Telemetry, Wire}

  @tick_ms 250
  @retry_write_ms 5
  # Between the kill of a process group and its exit status: the kernel needs moments, unless the
  # child sits in uninterruptible sleep, and then waiting longer helps nobody.
  @reap_ms 3_000
  # Between the polite signal and the kill, when the grace period is over.
  @term_ms 1_500
  # For its log to be read to the end, once nobody is left to write to it.
  @last_words_ms 1_000
  # After a crash of a sidecar that had worked, so many starts in a row may fail before the accepted requests do.
  @patience 3
  # A start that reaches `ready` and stays up this long is a good one: the back-off begins anew.
  @stable_ms 30_000
  # A tick that comes later than this says that this process, and maybe all of the machine, stood still.
  @late_ms 1_000
  # Work that has taken so many times what such work takes does not end any more.
  @patience_times 10

  defstruct [
    :config,
    :index,
    :role,
    :queue,
    :port,
    :os_pid,
    :log,
    :started_at,
    :start_by,
    :ready_at,
    :heard_at,
    :ticked_at,
    :heartbeat,
    :failure,
    slept: 0,
    generation: 0,
    phase: :starting,
    ever_ready: false,
    # Starts since the last one that reached `ready`; and those that count for the back-off, which a start
    # that is good but short is one of.
    unready_starts: 0,
    failed_starts: 0,
    buffer: nil,
    outbox: :queue.new(),
    images: %{},
    asked: %{}
  ]

  # What of the application's environment a sidecar sees. Everything else stays out: a host's secrets
  # are in its environment more often than not. HF_TOKEN and the proxies are what downloads need.
  @allowed_env ~w(PATH HOME USER LOGNAME SHELL LANG LANGUAGE TZ TMPDIR TEMP TMP XDG_CACHE_HOME XDG_DATA_HOME
    LD_LIBRARY_PATH DYLD_LIBRARY_PATH SSL_CERT_FILE SSL_CERT_DIR REQUESTS_CA_BUNDLE CURL_CA_BUNDLE
    HTTP_PROXY HTTPS_PROXY NO_PROXY ALL_PROXY http_proxy https_proxy no_proxy all_proxy
    TORCH_DTYPE TORCH_HOME CUDA_VISIBLE_DEVICES CUDA_DEVICE_ORDER CUDA_HOME CUDA_PATH
    HSA_OVERRIDE_GFX_VERSION HCC_AMDGPU_TARGET GPU_DEVICE_ORDINAL ZE_AFFINITY_MASK
    HF_HOME HF_TOKEN HF_TOKEN_PATH HF_ENDPOINT HUGGINGFACE_HUB_CACHE HF_MODULES_CACHE TRANSFORMERS_OFFLINE
    DO_NOT_TRACK DISABLE_TELEMETRY STARWEAVE_IMAGE_CACHE)
  @allowed_env_prefixes ~w(LC_ HF_HUB_ HF_XET_ NVIDIA_ HIP_ ROCR_ PYTORCH_ OMP_ MKL_ KMP_ ONEDNN_ DNNL_)

  @typedoc "A standby has everything imported and nothing loaded, until its queue makes it active."
  @type role :: :active | :standby

  def child_spec({index, config, role}) do
    %{
      id: {__MODULE__, index},
      start: {__MODULE__, :start_link, [{index, config, role}]},
      # Longer than everything that `terminate/2` may wait for.
      shutdown: config[:shutdown_grace] + 7_000
    }
  end

  def start_link({_index, _config, _role} = start), do: GenServer.start_link(__MODULE__, start)

  @doc "Says what the sidecar is from now on: a standby starts without preloading anything."
  @spec set_role(pid, role) :: :ok
  def set_role(sidecar, role) when role in [:active, :standby],
    do: GenServer.cast(sidecar, {:role, role})

  @doc "Sends a message of the protocol to the Python process of this generation; late ones are dropped."
  @spec send_message(pid, pos_integer, map) :: :ok
  def send_message(sidecar, generation, message),
    do: GenServer.cast(sidecar, {:send, generation, message})

  @doc "Which variables of `environment` a sidecar may see."
  @spec allowed_env([String.t()], [String.t()]) :: [String.t()]
  def allowed_env(names, extra) do
    Enum.filter(names, fn name ->
      name in @allowed_env or name in extra or
        Enum.any?(@allowed_env_prefixes, &String.starts_with?(name, &1))
    end)
  end

  @doc "The pause before start number `failures` + 1, in ms: exponential, half of it random."
  @spec backoff(non_neg_integer, {pos_integer, pos_integer}) :: non_neg_integer
  def backoff(0, _limits), do: 0

  def backoff(failures, {first, most}) do
    pause = min(most, first * Integer.pow(2, min(failures - 1, 20)))
    div(pause, 2) + :rand.uniform(div(pause, 2) + 1) - 1
  end

  @doc """
  Why a heartbeat shows a process that is alive but stuck, or nil.

  Only those are judged who work: the device on its pass, each load, and each request that does not
  wait for one of these. Who waits may have to wait for long, and is stuck only when nobody works.
  """
  @spec stuck(map, keyword) :: String.t() | nil
  def stuck(%{running: running} = beat, config) do
    {waiting, working} = Enum.split_with(running, & &1[:waits])
    {work, loads} = {beat[:device_work], beat[:loads] || []}

    cond do
      load = Enum.find(loads, &(&1.age_ms > config[:load_timeout])) ->
        "the load of #{load.model} has taken over #{seconds(config[:load_timeout])} s"

      work && work.age_ms > work_limit(work, config) ->
        "the device has been at one pass for over #{seconds(work_limit(work, config))} s"

      request = Enum.find(working, &(&1.step_age_ms > step_limit(&1, config))) ->
        limit = seconds(step_limit(request, config))
        "request #{request.id} has not moved for over #{limit} s while #{request.phase}"

      waiting != [] and {work, loads, working} == {nil, [], []} and
          Enum.all?(waiting, &(&1.step_age_ms > config[:stall_timeout])) ->
        "all requests have waited for over #{seconds(config[:stall_timeout])} s, and nothing is worked on"

      true ->
        nil
    end
  end

  defp work_limit(work, config) do
    least = if work.known, do: config[:stall_floor], else: config[:stall_timeout]
    max(least, @patience_times * work.usual_ms)
  end

  defp step_limit(%{phase: "loading"}, config), do: config[:load_timeout]

  defp step_limit(%{phase: "denoising", step_ms: known}, config) when known > 0,
    do: max(config[:stall_floor], @patience_times * known)

  defp step_limit(_request, config), do: config[:stall_timeout]

  defp seconds(ms), do: Float.round(ms / 1_000, 1)

  @impl true
  def init({index, config, role}) do
    # Killing a child that has output queued can send this process an `:epipe` exit.
    Process.flag(:trap_exit, true)
    state = %__MODULE__{config: config, index: index, role: role, queue: config[:name]}
    {:ok, state, {:continue, :start}}
  end

  @impl true
  def handle_continue(:start, state), do: {:noreply, start(state)}

  @impl true
  def handle_cast({:send, generation, message}, %{generation: generation, port: port} = state)
      when port != nil,
      do: {:noreply, state |> ask(message) |> push(message)}

  def handle_cast({:send, _generation, _message}, state), do: {:noreply, state}

  def handle_cast({:role, role}, %{role: role} = state), do: {:noreply, state}

  def handle_cast({:role, role}, state) do
    Logger.info("image sidecar #{state.index} is #{role} now")
    {:noreply, %{state | role: role}}
  end

  @impl true
  def handle_info({port, {:data, bytes}}, %{port: port} = state) do
    case Wire.feed(state.buffer, bytes) do
      {:ok, bodies, buffer} -> {:noreply, receive_bodies(%{state | buffer: buffer}, bodies)}
      {:error, reason} -> {:noreply, fail(state, "it sent #{reason}")}
    end
  end

  def handle_info({port, {:exit_status, status}}, %{port: port} = state),
    do: {:noreply, ended(state, exit_reason(status, state.failure))}

  # Instead of an exit status: the write of what was queued found nobody to read it.
  def handle_info({:EXIT, port, _reason}, %{port: port} = state) do
    sentence =
      if state.ready_at,
        do: "the Python process stopped reading and ended",
        else: "the Python process ended as it was started: run `mix image.setup` and see the log"

    {:noreply, ended(state, sentence)}
  end

  def handle_info(:tick, state) do
    Process.send_after(self(), :tick, @tick_ms)
    now = now()
    late = now - state.ticked_at - @tick_ms
    state = %{state | ticked_at: now, slept: state.slept + if(late > @late_ms, do: late, else: 0)}
    {:noreply, if(state.port, do: check(state), else: state)}
  end

  def handle_info({:restart, generation}, %{generation: generation, port: nil} = state),
    do: {:noreply, start(state)}

  def handle_info({:retry_write, generation}, %{generation: generation} = state),
    do: {:noreply, flush(state)}

  # What is left of a port that was closed, and the ends of the log readers.
  def handle_info(_message, state), do: {:noreply, state}

  @impl true
  def terminate(_reason, %{port: nil}), do: :ok

  def terminate(_reason, state) do
    grace = state.config[:shutdown_grace]

    # So that it is sent nothing more, and that what it does not finish is no attempt that cost a life.
    tell(state, :stopping)
    # One that is down has none.
    reader = if state.log, do: Process.monitor(state.log)

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
  defp drain(%{port: nil} = state, _deadline), do: state

  defp drain(%{port: port} = state, deadline) do
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
        signal_group(state.os_pid, "TERM")
        wait_for_exit(port, @term_ms) || kill(state)
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
        # Once down, it is down until a start succeeds: callers get their answer at once meanwhile.
        phase: if(state.phase == :down, do: :down, else: :starting),
        buffer: Wire.new(),
        outbox: :queue.new(),
        images: %{},
        asked: %{}
    }

    with {:ok, python} <- Environment.python(python: state.config[:python]),
         {:ok, log, socket_path} <- SidecarLog.start_link(state.config[:name], state.index),
         {:ok, port, os_pid} <- spawn_python(python, log, socket_path, state.config) do
      Telemetry.execute([:sidecar, :start], %{system_time: System.system_time()}, %{
        instance: state.config[:name],
        index: state.index,
        generation: state.generation,
        os_pid: os_pid
      })

      state = %{state | port: port, os_pid: os_pid, log: log}
      report(state, state.phase)
      state
    else
      {:error, sentence} -> ended(state, sentence)
    end
  end

  defp spawn_python(python, log, log_socket, config) do
    present = Map.keys(System.get_env())
    hidden = present -- allowed_env(present, config[:env])
    path = [{"PYTHONPATH", Environment.pythonpath()}, {"PYTHONUNBUFFERED", "1"}]

    env =
      Enum.map(hidden, &{String.to_charlist(&1), false}) ++
        Enum.map(path, fn {name, value} ->
          {String.to_charlist(name), String.to_charlist(value)}
        end)

    port =
      Port.open({:spawn_executable, python}, [
        :binary,
        :exit_status,
        :nouse_stdio,
        :hide,
        # The driver must call itself busy early, or `nosuspend` would queue without bound.
        {:busy_limits_port, {1_048_576, 4_194_304}},
        args: ["-m", "starweave_image", "port", "--log-socket", log_socket],
        env: env
      ])

    case Port.info(port, :os_pid) do
      {:os_pid, os_pid} ->
        {:ok, port, os_pid}

      # It has ended already, and its status came before the port was closed.
      nil ->
        SidecarLog.stop(log)

        receive do
          {^port, {:exit_status, status}} -> {:error, exit_reason(status, nil)}
        after
          0 -> {:error, "the Python process ended as it was started: run `mix image.setup`"}
        end
    end
  rescue
    # ErlangError with :enoent, :eacces, …
    error in ErlangError ->
      SidecarLog.stop(log)
      {:error, "Python cannot be started (#{inspect(error.original)}): run `mix image.setup`"}
  end

  defp hello(state) do
    config = state.config

    %{
      t: "hello",
      v: Wire.version(),
      g: state.generation,
      config: %{
        models: Enum.map(config[:models], &model_entry/1),
        default_model: config[:default_model],
        device: config[:device],
        dtype: config[:dtype],
        preload: if(state.role == :active, do: config[:preload], else: []),
        pinned: config[:pinned],
        memory_budget: config[:memory_budget],
        ram_budget: config[:ram_budget],
        offload: config[:offload],
        attention: config[:attention],
        vae: config[:vae],
        compile: config[:compile],
        backend: config[:backend],
        offline: config[:offline],
        capacity: config[:capacity],
        heartbeat_interval_ms: config[:heartbeat_interval]
      }
    }
  end

  defp model_entry(id) when is_binary(id), do: %{id: id}
  defp model_entry({id, options}), do: options |> Map.new() |> Map.put(:id, id)

  ## What the Python process says

  defp receive_bodies(state, []), do: state
  # A body handled before this one ended the process.
  defp receive_bodies(%{port: nil} = state, _bodies), do: state

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
      reason = stuck(beat, state.config) ->
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
          os_pid: state.os_pid,
          device: ready.device,
          dtype: ready.dtype
        }
      )

      # The silence of its imports ends here, not with the next heartbeat.
      state = %{state | ready_at: now(), heard_at: awake(state), ever_ready: true, phase: :ready}
      tell(state, {:ready, ready})
      state
    else
      fail(state, "it speaks version #{ready.v} of the protocol")
    end
  end

  # What it says before it knows its generation, such as what is wrong with `hello`, has a 0 in its place.
  defp receive_message(state, %{t: :error, g: g, id: nil} = error)
       when g in [0, state.generation] do
    Logger.error("#{label(state)}: #{error.message}")
    # Before `ready`, this is why it cannot start.
    if state.ready_at, do: state, else: %{state | failure: error.message}
  end

  defp receive_message(state, %{t: :log} = log) do
    metadata = if log.id, do: [request_id: log.id], else: []
    Logger.log(log.level, "#{label(state)}: #{log.message}", metadata)
    state
  end

  defp receive_message(%{generation: g} = state, %{t: :image, g: g} = part),
    do: receive_image(state, part)

  defp receive_message(%{generation: g} = state, %{t: :error, g: g} = error) do
    tell(state, {:message, error})
    state = answered(state, error.id)
    if error.kind == "model_load_failed", do: ask_for_models(state), else: state
  end

  defp receive_message(%{generation: g} = state, %{t: :done, g: g} = done) do
    tell(state, {:message, done})
    answered(state, done.id)
  end

  defp receive_message(%{generation: g} = state, %{t: type, g: g} = message)
       when type in [:accepted, :progress, :preview, :models] do
    tell(state, {:message, message})
    state
  end

  defp receive_message(state, message) do
    Logger.debug("#{label(state)}: dropped #{inspect(message.t)}")
    state
  end

  defp receive_image(state, %{id: id, index: index, offset: offset} = part) do
    key = {id, index}
    {parts, have} = Map.get(state.images, key, {[], 0})
    have_now = have + byte_size(part.data)

    cond do
      offset != have or part.data == "" or have_now > part.size ->
        fail(state, "it sent the parts of an image out of order")

      have_now < part.size ->
        put_in(state.images[key], {[part.data | parts], have_now})

      true ->
        data = [part.data | parts] |> Enum.reverse() |> IO.iodata_to_binary()

        if Base.encode16(:crypto.hash(:sha256, data), case: :lower) == part.sha256 do
          tell(state, {:message, %{part | data: data}})
          %{state | images: Map.delete(state.images, key)}
        else
          fail(state, "it sent an image that does not match its checksum")
        end
    end
  end

  # A process may be alive and well and yet not know of a request: it reads nothing, or forgot it. So
  # what it was asked must be in its heartbeats, from soon after until it is answered.
  defp ask(state, %{t: "generate", id: id}), do: put_in(state.asked[id], awake(state))
  defp ask(state, _message), do: state

  defp listed(state) do
    now = awake(state)
    listed = for %{id: id} <- state.heartbeat.running, is_map_key(state.asked, id), do: {id, now}
    %{state | asked: Map.merge(state.asked, Map.new(listed))}
  end

  defp answered(state, id) do
    images = state.images |> Enum.reject(&match?({{^id, _}, _}, &1)) |> Map.new()
    %{state | images: images, asked: Map.delete(state.asked, id)}
  end

  defp ask_for_models(state), do: push(state, %{t: "models", g: state.generation, id: "models"})

  ## Health

  defp check(state) do
    awake = awake(state)
    config = state.config

    # The import of a large library may hold the interpreter for long, and the heartbeat with it.
    importing? = is_nil(state.ready_at) and state.heartbeat != nil

    cond do
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

  defp flush(%{port: nil} = state), do: state

  defp flush(state) do
    with {:value, frame} <- :queue.peek(state.outbox),
         true <- :erlang.port_command(state.port, frame, [:nosuspend]) do
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
    kill(state)
    ended(state, reason)
  end

  defp kill(state) do
    signal_group(state.os_pid, "KILL")
    wait_for_exit(state.port, @reap_ms)
  end

  defp ended(state, sentence) do
    state = close(state)
    good? = state.ready_at != nil
    failed_starts = if good?, do: state.failed_starts, else: state.failed_starts + 1
    # A first restart after a good start is at once; from then on each one waits longer.
    pause = backoff(failed_starts, {state.config[:backoff_min], state.config[:backoff_max]})
    failed_starts = if good?, do: failed_starts + 1, else: failed_starts

    unready_starts = if good?, do: 0, else: state.unready_starts + 1

    if state.os_pid, do: log_end(state, sentence, pause)

    phase =
      cond do
        good? -> :starting
        state.ever_ready and unready_starts < @patience and state.phase != :down -> :starting
        true -> :down
      end

    Process.send_after(self(), {:restart, state.generation}, pause)

    state = %{
      state
      | os_pid: nil,
        phase: phase,
        failed_starts: failed_starts,
        unready_starts: unready_starts
    }

    tell(state, {:ended, phase, sentence})
    state
  end

  defp log_end(state, sentence, pause) do
    Logger.warning("#{label(state)} ended: #{sentence}; next start in #{pause} ms")

    Telemetry.execute(
      [:sidecar, :stop],
      %{
        duration: System.convert_time_unit(now() - state.started_at, :millisecond, :native)
      },
      %{
        instance: state.config[:name],
        index: state.index,
        generation: state.generation,
        os_pid: state.os_pid,
        reason: sentence
      }
    )
  end

  defp close(state) do
    if state.port do
      # Also after a clean exit: whoever the process forked and left behind is in its group.
      signal_group(state.os_pid, "KILL")

      try do
        Port.close(state.port)
      rescue
        ArgumentError -> true
      end

      drop_messages(state.port)
    end

    if state.log, do: SidecarLog.stop(state.log)
    %{state | port: nil, log: nil}
  end

  defp drop_messages(port) do
    receive do
      {^port, _} -> drop_messages(port)
      {:EXIT, ^port, _} -> drop_messages(port)
    after
      0 -> :ok
    end
  end

  defp wait_for_exit(port, timeout) do
    receive do
      {^port, {:exit_status, _}} -> true
      {:EXIT, ^port, _} -> true
    after
      timeout -> false
    end
  end

  # `kill` is no BIF. The child leads its own process group, so -PID reaches all that it started.
  defp signal_group(os_pid, signal) do
    _ = :os.cmd(~c"kill -s #{signal} -- -#{os_pid} 2>/dev/null")
    :ok
  end

  defp exit_reason(_status, failure) when is_binary(failure), do: failure

  defp exit_reason(69, _),
    do: "a Python package is missing or cannot be imported: run `mix image.setup` and see the log"

  defp exit_reason(64, _), do: "the Python process refused its command line"
  defp exit_reason(65, _), do: "the Python process lost the framing"
  defp exit_reason(66, _), do: "the Python process refused the handshake"
  defp exit_reason(0, _), do: "the Python process ended by itself"

  defp exit_reason(status, _) when status > 128,
    do: "the Python process was killed by signal #{status - 128}"

  defp exit_reason(status, _),
    do: "the Python process ended with status #{status}; the log has its last words"

  ## To the queue

  defp report(state, phase) do
    tell(
      state,
      {:state,
       %{
         state: phase,
         os_pid: state.os_pid,
         uptime_ms: now() - state.started_at,
         heartbeat: state.heartbeat
       }}
    )
  end

  defp tell(state, event),
    do: GenServer.cast(state.queue, {:sidecar, self(), state.index, state.generation, event})

  defp label(%{role: :standby, index: index}), do: "image sidecar #{index} (standby)"
  defp label(%{index: index}), do: "image sidecar #{index}"

  defp now, do: System.monotonic_time(:millisecond)

  # A clock that stands still while this process does: what came in the meantime has not been read yet.
  defp awake(state), do: now() - state.slept
end
