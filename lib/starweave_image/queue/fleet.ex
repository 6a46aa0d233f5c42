defmodule StarweaveImage.Queue.Fleet do
  @moduledoc false
  # What the queue knows of its sidecars: which exist, which are active or on standby, and the state of each.
  # Pure; the queue sends and receives the messages.
  #
  # A seat is the numbered place of a sidecar, with the last report of its owner process. Seats of one kind have the
  # same options, so that a spare can take over from any active sidecar of its kind.

  alias StarweaveImage.Error

  defmodule Seat do
    @moduledoc false
    @type t :: %__MODULE__{}
    defstruct [
      :index,
      :kind,
      :pid,
      :monitor,
      :os_pid,
      :ready,
      :catalog,
      :heartbeat,
      :error,
      # Of the present owner process, or of the last one if there is none.
      birth: nil,
      role: :active,
      draining?: false,
      stopping?: false,
      generation: 0,
      state: :starting,
      uptime_ms: 0,
      capacity: 0
    ]
  end

  # `last`: the highest index used so far. Indexes are never reused.
  defstruct [:enabled?, :last, seats: %{}]

  @type index :: pos_integer
  @type t :: %__MODULE__{}

  @doc "Seats for `layout`, which gives the kind and the first role of each sidecar."
  @spec new(boolean, [%{index: index, kind: term, role: :active | :standby}]) :: t
  def new(enabled?, layout) do
    seats = if enabled?, do: Map.new(layout, &{&1.index, struct!(Seat, &1)}), else: %{}
    %__MODULE__{enabled?: enabled?, seats: seats, last: Enum.max([0 | Map.keys(seats)])}
  end

  @spec add(t, term) :: {index, t}
  def add(fleet, kind) do
    index = fleet.last + 1
    {index, put(%{fleet | last: index}, %Seat{index: index, kind: kind})}
  end

  @spec remove(t, index) :: t
  def remove(fleet, index), do: %{fleet | seats: Map.delete(fleet.seats, index)}

  @spec get(t, index) :: Seat.t() | nil
  def get(fleet, index), do: fleet.seats[index]

  @doc """
  Which owner sent a message. Each owner process has a larger birth number than those before it, so messages of a former
  owner are recognised however late they arrive. After a keeper is killed, for example, the next owner can report while
  the former one is still ending its Python process.
  """
  @spec owner(t, index, {birth :: integer, pid}) :: :present | :new | :former | :of_no_seat
  def owner(fleet, index, {birth, _pid}) do
    case fleet.seats do
      %{^index => %{birth: ^birth}} -> :present
      %{^index => %{birth: last}} when last == nil or birth > last -> :new
      %{^index => _} -> :former
      _ -> :of_no_seat
    end
  end

  @spec find(t, reference) :: index | nil
  def find(fleet, monitor),
    do: Enum.find_value(fleet.seats, fn {index, seat} -> seat.monitor == monitor && index end)

  @spec put(t, Seat.t()) :: t
  def put(fleet, seat), do: %{fleet | seats: Map.put(fleet.seats, seat.index, seat)}

  @spec update(t, index, map | keyword) :: t
  def update(fleet, index, news), do: put(fleet, struct!(fleet.seats[index], news))

  @typedoc "A sidecar's report: its state, that it is ready, that it is being stopped on purpose, or its models."
  @type news ::
          {:state, map} | {:ready, map} | :stopping | {:message, %{t: :models, models: [map]}}

  @doc "A sidecar reports its own state."
  @spec heard(t, index, news) :: t
  def heard(fleet, index, {:state, seen}) do
    capacity = seen.heartbeat && seen.heartbeat.capacity
    ready? = fleet.seats[index].ready != nil
    # Before the sidecar is ready, the capacity in its heartbeats is not yet meaningful.
    seen = if ready? and capacity, do: Map.put(seen, :capacity, capacity), else: seen
    update(fleet, index, seen)
  end

  def heard(fleet, index, {:ready, ready}) do
    update(fleet, index,
      state: :ready,
      ready: Map.take(ready, [:device, :device_name, :dtype, :versions, :default_model]),
      catalog: ready.catalog,
      capacity: ready.capacity,
      error: nil
    )
  end

  # Requests that it leaves unfinished are not blamed for its end.
  def heard(fleet, index, :stopping), do: update(fleet, index, stopping?: true)

  def heard(fleet, index, {:message, %{t: :models, models: models}}),
    do: update(fleet, index, catalog: models)

  @doc "The process of a sidecar has ended, or could not be started."
  @spec ended(t, index, atom, String.t()) :: t
  def ended(fleet, index, state, why) do
    update(fleet, index,
      state: state,
      ready: nil,
      heartbeat: nil,
      os_pid: nil,
      capacity: 0,
      stopping?: false,
      error: why
    )
  end

  @doc "Whether the sidecar takes requests."
  @spec open?(Seat.t()) :: boolean
  def open?(seat),
    do: seat.ready != nil and seat.role == :active and not seat.draining? and not seat.stopping?

  @doc "The active seats that are ready to work, in order."
  @spec at_work(t) :: [Seat.t()]
  def at_work(fleet), do: for(%{ready: ready} = seat <- active(fleet), ready != nil, do: seat)

  @doc """
  Lets a ready spare take over from an active sidecar of its kind that had worked and is gone, if both exist.
  """
  @spec relieve(t) :: {:ok, gone :: index, spare :: index, t} | :none
  def relieve(fleet) do
    with gone when gone != nil <-
           Enum.find(active(fleet), &(&1.ready == nil and &1.error != nil and not &1.draining?)),
         spare when spare != nil <-
           Enum.find(
             sorted(fleet),
             &(&1.role == :standby and &1.kind == gone.kind and &1.ready != nil and
                 not &1.draining? and not &1.stopping?)
           ) do
      fleet = fleet |> update(gone.index, role: :standby) |> update(spare.index, role: :active)

      {:ok, gone.index, spare.index, fleet}
    else
      nil -> :none
    end
  end

  defp sorted(fleet), do: fleet.seats |> Map.values() |> Enum.sort_by(& &1.index)
  defp active(fleet), do: fleet |> sorted() |> Enum.filter(&(&1.role == :active))

  ## What callers see

  @doc "The state of the whole fleet, given the ids of the requests that each sidecar works on."
  @spec state(t, %{index => [String.t()]}) :: atom
  def state(%{enabled?: false}, _taken), do: :disabled

  def state(fleet, taken) do
    # A sidecar that has not reported yet counts as starting.
    phases = Enum.map(active(fleet), &phase(&1, taken))

    Enum.find([:loading, :busy, :ready, :stalled, :starting, :down], :starting, &(&1 in phases))
  end

  @doc "Whether no sidecar works or is starting."
  @spec down?(t) :: boolean
  def down?(fleet), do: state(fleet, %{}) == :down

  @doc "The error with which every request is refused; nil if work is possible, or may soon be."
  @spec closed(t) :: Error.t() | nil
  def closed(fleet) do
    case state(fleet, %{}) do
      :disabled ->
        Error.new(:disabled, "image generation is disabled in this application's configuration")

      :down ->
        unavailable(reason(fleet))

      _ ->
        nil
    end
  end

  @doc "The error for an instance that cannot work. `reason` is part of a sentence."
  @spec unavailable(String.t()) :: Error.t()
  def unavailable(reason),
    do: Error.new(:unavailable, "image generation is not available: #{reason}")

  @doc "Why nothing works."
  @spec reason(t) :: String.t()
  def reason(fleet), do: Enum.find_value(active(fleet), "it has not started", & &1.error)

  @spec error(t) :: String.t() | nil
  def error(fleet), do: Enum.find_value(active(fleet), & &1.error)

  # Between two heartbeats the queue's own count of requests is more recent.
  defp phase(%{state: :draining}, _taken), do: :busy

  defp phase(%{state: :ready, index: index}, taken),
    do: if(taken[index] in [nil, []], do: :ready, else: :busy)

  defp phase(%{state: state}, _taken), do: state

  # Where sidecars report different states of a model, the one most useful to a request wins: the first in this list.
  @states ~w(loaded loading available remote failed absent)a

  @doc """
  The models of the sidecars that are up. If none is, the last report of one that was, with no model loaded any more.
  """
  @spec models(t) :: [map]
  def models(fleet) do
    case for %{catalog: [_ | _] = catalog} <- at_work(fleet), do: catalog do
      [] ->
        for card <- Enum.find_value(active(fleet) ++ sorted(fleet), [], & &1.catalog) do
          if card.state in [:loaded, :loading], do: %{card | state: :available}, else: card
        end

      [first | _] = catalogs ->
        cards = catalogs |> Enum.concat() |> Enum.group_by(& &1.id)

        for %{id: id} <- first,
            do:
              Enum.min_by(cards[id], &Enum.find_index(@states, fn state -> state == &1.state end))
    end
  end

  @doc "The model's id, given its id or an alias; unchanged if no card has it."
  @spec canonical(t, String.t()) :: String.t()
  def canonical(fleet, model) do
    case card(fleet, model) do
      nil -> model
      card -> card.id
    end
  end

  @doc "The models that may replace one that cannot be used."
  @spec fallbacks(t, String.t()) :: [String.t()]
  def fallbacks(fleet, model) do
    card = card(fleet, model)
    (card && card.fallbacks) || []
  end

  @doc "The card of a model by its id or an alias."
  @spec card(t, String.t()) :: map | nil
  def card(fleet, model),
    do: Enum.find(models(fleet), &(&1.id == model or model in &1.aliases))

  @spec statuses(t, %{index => [String.t()]}) :: [map]
  def statuses(fleet, taken) do
    for seat <- sorted(fleet) do
      beat = seat.heartbeat || %{}

      %{
        index: seat.index,
        role: seat.role,
        state: phase(seat, taken),
        draining: seat.draining?,
        generation: seat.generation,
        os_pid: seat.os_pid,
        uptime_ms: seat.uptime_ms,
        device: seat.ready && seat.ready.device,
        device_name: seat.ready && seat.ready.device_name,
        dtype: seat.ready && seat.ready.dtype,
        versions: (seat.ready && seat.ready.versions) || %{},
        capacity: seat.capacity,
        running: Map.get(taken, seat.index, []),
        requests: Map.get(beat, :running, []),
        resident: Map.get(beat, :resident, []),
        device_memory: Map.get(beat, :device_memory),
        rss: Map.get(beat, :rss),
        counters: Map.get(beat, :counters, %{}),
        error: seat.error
      }
    end
  end
end
