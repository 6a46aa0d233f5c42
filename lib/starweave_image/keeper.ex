defmodule StarweaveImage.Keeper do
  @moduledoc false
  # A supervisor of one child that never gives up. However often and for whatever reason the child ends, it is started
  # again: at once if it had been well, otherwise after a growing pause. A `Supervisor` would count the restarts, end
  # itself and then its own supervisor, so a fault of ours, or somebody who kills our processes, would end the host.
  #
  # If the child's supervisor was killed, some processes below it may still run when the next start is due. So before
  # each start the keeper waits until none of the `names` is registered. It does so without blocking its own
  # supervisor.

  use GenServer
  use StarweaveImage.CrashLog
  require Logger

  alias StarweaveImage.Backoff

  # A child that lived this long had been well.
  @stable_ms 5_000
  @pauses {100, 30_000}
  # How often to look again when a name is still taken.
  @look_again_ms 50

  @enforce_keys [:child, :name, :names, :type, :shutdown]
  defstruct @enforce_keys ++ [:pid, :awaited, :started_at, failures: 0]

  @type option ::
          {:child, {module, atom, [term]}}
          | {:type, :supervisor | :worker}
          | {:shutdown, timeout}
          | {:name, atom}
          | {:names, [atom]}
          | {:yields?, boolean}

  @doc """
  Starts `:child`, a function that starts and links a process, and starts it again whenever it ends.

  With `:name` there is one keeper of that name: a second one is refused with `:already_started`, unless the first is
  about to end, or was started with `yields?: true` and so makes room. `:shutdown` is how long the child may take to
  end.
  """
  @spec start_link([option]) :: GenServer.on_start()
  def start_link(opts) do
    with :ok <- claim(opts[:name]), do: GenServer.start_link(__MODULE__, {self(), opts})
  end

  # A keeper whose parent has ended ends too. It is not called, since it may be ending at this moment.
  defp claim(name) do
    with pid when pid != nil <- name && Process.whereis(name),
         {:dictionary, dictionary} <- Process.info(pid, :dictionary),
         {_, {parent, yields?}} <- List.keyfind(dictionary, __MODULE__, 0),
         true <- Process.alive?(parent) do
      if yields?, do: GenServer.cast(pid, :yield), else: {:error, {:already_started, pid}}
    else
      _free_or_soon_so -> :ok
    end
  end

  @impl true
  def init({parent, opts}) do
    Process.flag(:trap_exit, true)
    Process.put(__MODULE__, {parent, Keyword.get(opts, :yields?, false)})

    {:ok,
     begin(%__MODULE__{
       child: Keyword.fetch!(opts, :child),
       type: Keyword.get(opts, :type, :worker),
       shutdown: Keyword.get(opts, :shutdown, :infinity),
       name: opts[:name],
       names: Keyword.get(opts, :names, [])
     })}
  end

  @impl true
  def handle_info({:EXIT, pid, reason}, %{pid: pid} = state) do
    well? = now() - state.started_at >= @stable_ms
    failures = if well?, do: 0, else: state.failures + 1
    {:noreply, again(%{state | pid: nil, failures: failures}, reason)}
  end

  def handle_info({:DOWN, monitor, :process, _pid, _reason}, %{awaited: monitor} = state),
    do: {:noreply, begin(%{state | awaited: nil})}

  def handle_info(:begin, %{pid: nil, awaited: nil} = state), do: {:noreply, begin(state)}
  def handle_info(_message, state), do: {:noreply, state}

  @impl true
  def handle_cast(:yield, state), do: {:stop, {:shutdown, :yielded}, state}

  # The calls that tools make to a supervisor.
  @impl true
  def handle_call(:which_children, _from, state) do
    {module, _function, _arguments} = state.child
    {:reply, [{:kept, state.pid || :restarting, state.type, [module]}], state}
  end

  def handle_call(:count_children, _from, state) do
    supervisors = if state.type == :supervisor, do: 1, else: 0
    active = if state.pid, do: 1, else: 0

    {:reply, [specs: 1, active: active, supervisors: supervisors, workers: 1 - supervisors],
     state}
  end

  @impl true
  def terminate(_reason, %{pid: nil}), do: :ok

  def terminate(_reason, %{pid: pid} = state) do
    monitor = Process.monitor(pid)
    Process.exit(pid, :shutdown)

    receive do
      {:DOWN, ^monitor, _, _, _} -> :ok
    after
      state.shutdown ->
        Process.exit(pid, :kill)
        receive do: ({:DOWN, ^monitor, _, _, _} -> :ok)
    end
  end

  defp begin(state) do
    case holder([state.name | state.names]) do
      nil ->
        if named?(state.name), do: start(state), else: soon(state, @look_again_ms)

      pid ->
        # The log says so, since the name may belong to an unrelated process.
        Logger.info(
          "#{describe(state)} waits until #{inspect(pid)}, which has its name, has ended"
        )

        %{state | awaited: Process.monitor(pid)}
    end
  end

  defp holder(names) do
    Enum.find_value(names, fn name ->
      pid = name && Process.whereis(name)
      if pid != self(), do: pid
    end)
  end

  defp named?(nil), do: true

  defp named?(name) do
    Process.whereis(name) == self() or Process.register(self(), name)
  rescue
    # Another process took the name first.
    ArgumentError -> false
  end

  defp start(%{child: {module, function, arguments}} = state) do
    case apply(module, function, arguments) do
      {:ok, pid} -> %{state | pid: pid, started_at: now()}
      {:error, reason} -> again(%{state | failures: state.failures + 1}, reason)
    end
  end

  defp again(state, reason) do
    pause = Backoff.pause(state.failures, @pauses)

    # The rest of the reason may hold what users asked for.
    why = if is_atom(reason), do: inspect(reason), else: "a fault that the log has"
    Logger.warning("#{describe(state)} ended (#{why}); next start in #{pause} ms")
    soon(state, pause)
  end

  defp soon(state, ms) do
    Process.send_after(self(), :begin, ms)
    state
  end

  defp describe(%{names: [name | _]}), do: inspect(name)
  defp describe(%{child: {module, _, _}}), do: inspect(module)

  defp now, do: System.monotonic_time(:millisecond)
end
