defmodule StarweaveImage.Supervisor do
  @moduledoc false
  # One running instance:
  #
  #     StarweaveImage.Keeper, the child of the host's supervisor
  #     └── StarweaveImage.Supervisor (rest_for_one)
  #         ├── StarweaveImage.Journal, where there is one
  #         ├── StarweaveImage.Queue, registered as the instance's name
  #         └── sidecar supervisor (one_for_one)
  #             └── StarweaveImage.Keeper × sidecars
  #                 └── StarweaveImage.Sidecar ── log reader ═ port ═ Python
  #
  # Keepers wait between restarts and never give up; supervisors restart at once, and give up if that does not help.
  #
  # The queue starts before the sidecars and outlives them, since it owns the requests. If the queue dies, the sidecars'
  # work cannot be matched to requests any more, so they are restarted after it, and durable requests are read from the
  # journal.

  use Supervisor

  # High enough that processes killed by hand or by a script do not exceed it; a child that cannot start exceeds it at
  # once.
  @restarts [max_restarts: 50, max_seconds: 5]

  alias StarweaveImage.{Config, Journal, Keeper, Queue, Sidecar}

  @doc "Starts an instance; with `yields?: true`, it ends as soon as another one of the same name is started."
  @spec start_link(keyword, [{:yields?, boolean}]) :: Supervisor.on_start()
  def start_link(opts, how \\ []) do
    config = Config.new(opts)

    [keeper, own, sidecars] =
      for name <- ~w(Keeper Supervisor Sidecars), do: Module.concat(config[:name], name)

    journal = Queue.journal(config)

    Keeper.start_link(
      [
        name: keeper,
        child: {Supervisor, :start_link, [__MODULE__, config, [name: own]]},
        type: :supervisor,
        names: [own, sidecars, config[:name] | List.wrap(journal)]
      ] ++ how
    )
  end

  @impl true
  def init(config) do
    layout = layout(config)
    config = [layout: layout] ++ config

    sidecars =
      if config[:enabled],
        do: for(seat <- layout, do: sidecar_child(config, seat.index, seat.kind, seat.role)),
        else: []

    journal =
      if config[:journal],
        do: [
          {Journal,
           name: Queue.journal(config), instance: config[:name], folder: config[:journal]}
        ],
        else: []

    children =
      journal ++
        [
          {Queue, config},
          %{
            id: :sidecars,
            type: :supervisor,
            start:
              {Supervisor, :start_link,
               [
                 sidecars,
                 [strategy: :one_for_one, name: sidecars_name(config[:name])] ++ @restarts
               ]}
          }
        ]

    Supervisor.init(children, [strategy: :rest_for_one] ++ @restarts)
  end

  # The configured sidecars, followed by the spares of each kind.
  defp layout(config) do
    kinds =
      case config[:sidecars] do
        count when is_integer(count) -> List.duplicate([], count)
        kinds -> kinds
      end

    spares = for kind <- Enum.uniq(kinds), _ <- 1..config[:standby]//1, do: {kind, :standby}

    for {{kind, role}, index} <- Enum.with_index(Enum.map(kinds, &{&1, :active}) ++ spares, 1),
        do: %{index: index, kind: kind, role: role}
  end

  defp sidecar_child(config, index, kind, role) do
    sidecar = {index, Keyword.merge(config, kind), role}

    kept = [
      child: {Sidecar, :start_link, [sidecar]},
      # Longer than everything that the sidecar's `terminate/2` may wait for.
      shutdown: config[:shutdown_grace] + 7_000
    ]

    %{
      id: {Sidecar, index},
      type: :supervisor,
      start: {Keeper, :start_link, [kept]}
    }
  end

  defp sidecars_name(name), do: Module.concat(name, "Sidecars")

  @doc false
  # Runs in the caller, not in the queue, which must not wait for a process to end.
  @spec add_sidecar(atom, pos_integer, keyword) :: :ok | {:error, term}
  def add_sidecar(name, index, config) do
    child = sidecar_child(config, index, [], :active)
    with {:ok, _pid} <- with_sidecars(name, &Supervisor.start_child(&1, child)), do: :ok
  end

  @doc false
  @spec remove_sidecar(atom, pos_integer) :: :ok | {:error, :not_running}
  def remove_sidecar(name, index) do
    with_sidecars(name, fn sidecars ->
      _ = Supervisor.terminate_child(sidecars, {Sidecar, index})
      _ = Supervisor.delete_child(sidecars, {Sidecar, index})
      :ok
    end)
  end

  defp with_sidecars(name, fun) do
    fun.(sidecars_name(name))
  catch
    :exit, _reason -> {:error, :not_running}
  end
end
