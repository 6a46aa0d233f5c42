defmodule StarweaveImage.Queue.Crew do
  @moduledoc false
  # The queue's sidecars as processes: their owners are watched, told their roles and sent messages, spares take over,
  # operations go to all of them, and whoever waits for a start, a drain or an operation is answered. What is decided here
  # is decided by `Fleet`, which knows how each one is, and by `Operations`; both are pure. Requests are the queue's.

  require Logger

  alias StarweaveImage.{Error, Sidecar}
  alias StarweaveImage.Queue.{Fleet, Operations}

  # `awaiting_start` and `drains` hold who waits for an answer, the latter by the index of a sidecar.
  @enforce_keys [:name, :preload, :fleet]
  defstruct [
    :name,
    :preload,
    :fleet,
    operations: Operations.new(),
    awaiting_start: [],
    drains: %{}
  ]

  @type t :: %__MODULE__{}
  @type index :: Fleet.index()
  @typedoc "The ids of the requests that each sidecar works on."
  @type taken :: %{index => [String.t()]}

  @doc "The crew of an instance, which nobody was heard of yet. The calling process owns the table of `available?/1`."
  @spec new(keyword) :: t
  def new(config) do
    name = config[:name]
    :ets.new(table(name), [:named_table, :protected, read_concurrency: true])
    fleet = Fleet.new(config[:enabled], config[:layout])
    put(%__MODULE__{name: name, preload: config[:preload], fleet: fleet}, fleet)
  end

  @doc "Whether a sidecar is up, as last known: answered by a table, whatever the queue is doing."
  @spec available?(atom) :: boolean
  def available?(name) do
    :ets.lookup_element(table(name), :available?, 2)
  rescue
    # No queue, no table.
    ArgumentError -> false
  end

  defp table(name), do: Module.concat(name, "Available")

  defp put(crew, fleet) do
    up? = Fleet.state(fleet, %{}) in [:ready, :busy, :loading]
    :ets.insert(table(crew.name), {:available?, up?})
    %{crew | fleet: fleet}
  end

  @spec get(t, index) :: Fleet.Seat.t() | nil
  def get(crew, index), do: Fleet.get(crew.fleet, index)

  @doc "News of a sidecar, as of `Fleet.update/3`."
  @spec update(t, index, map | keyword) :: t
  def update(crew, index, news), do: put(crew, Fleet.update(crew.fleet, index, news))

  @doc "A sidecar says something of itself, as of `Fleet.heard/3`."
  @spec heard(t, index, Fleet.news()) :: t
  def heard(crew, index, news), do: put(crew, Fleet.heard(crew.fleet, index, news))

  @doc "What `Schedule.sidecar/3` is to know of it."
  @spec slots(t, index) :: keyword
  def slots(crew, index) do
    seat = get(crew, index)
    resident = if seat.heartbeat, do: seat.heartbeat.resident, else: []
    device = seat.ready && seat.ready.device
    [open?: Fleet.open?(seat), capacity: seat.capacity, device: device, resident: resident]
  end

  @spec send_to(t, index, map) :: :ok
  def send_to(crew, index, message), do: send_to_seat(get(crew, index), message)

  defp send_to_seat(seat, message) do
    message = Map.put(message, :g, seat.generation)
    Sidecar.send_message(seat.pid, seat.generation, message)
  end

  ## Who there is

  @doc "One more sidecar, with options of its own; its owner is started by whoever asks for it."
  @spec add(t, keyword) :: {index, t}
  def add(crew, options) do
    {index, fleet} = Fleet.add(crew.fleet, options)
    {index, put(crew, fleet)}
  end

  @spec remove(t, index) :: t
  def remove(crew, index), do: put(crew, Fleet.remove(crew.fleet, index))

  @doc "A new owner of a sidecar is heard; the one before it must be off."
  @spec sign_on(t, index, {birth :: integer, pid}) :: t
  def sign_on(crew, index, {birth, pid}) do
    # It was started with the role of its predecessor's first day.
    Sidecar.set_role(pid, get(crew, index).role)
    update(crew, index, pid: pid, birth: birth, monitor: Process.monitor(pid))
  end

  @doc "The owner of a sidecar is gone, or another one takes its place; `:off` where there was none."
  @spec sign_off(t, index) :: {:ok, t} | :off
  def sign_off(crew, index) do
    case get(crew, index) do
      %{monitor: nil} ->
        :off

      %{monitor: monitor} ->
        Process.demonitor(monitor, [:flush])
        {:ok, update(crew, index, pid: nil, monitor: nil)}
    end
  end

  @doc "The Python process of a sidecar is no more, or not yet."
  @spec ended(t, index, atom, String.t()) :: t
  def ended(crew, index, phase, sentence),
    do: put(crew, Fleet.ended(crew.fleet, index, phase, sentence))

  @doc "Spares take over from active sidecars that are gone. Gives the indexes of all of them."
  @spec relieve(t) :: {[index], t}
  def relieve(crew) do
    case Fleet.relieve(crew.fleet) do
      {:ok, gone, spare, fleet} ->
        %{pid: pid} = seat = Fleet.get(fleet, spare)
        Logger.info("image sidecar #{spare}, which stood by, takes over from #{gone}")
        if gone_pid = Fleet.get(fleet, gone).pid, do: Sidecar.set_role(gone_pid, :standby)
        Sidecar.set_role(pid, :active)

        # Nobody is told when it is loaded: a request that needs the model waits for the same load.
        for model <- crew.preload do
          id = "preload-#{String.replace(model, "/", ":")}"
          send_to_seat(seat, %{t: "load_model", id: id, model: model})
        end

        {changed, crew} = crew |> put(fleet) |> relieve()
        {[gone, spare | changed], crew}

      :none ->
        {[], crew}
    end
  end

  ## Who waits for them

  @doc "Answers `from` when there is an outcome of the start, `:ok` or an error."
  @spec await_start(t, GenServer.from(), taken) :: t
  def await_start(crew, from, taken),
    do: settle(%{crew | awaiting_start: [from | crew.awaiting_start]}, taken)

  @doc "Answers those who wait for the outcome of the start, once there is one."
  @spec settle(t, taken) :: t
  def settle(%{awaiting_start: []} = crew, _taken), do: crew

  def settle(crew, taken) do
    state = Fleet.state(crew.fleet, taken)

    if state in [:starting, :stalled] do
      crew
    else
      error = Fleet.closed(crew.fleet)
      answer = if error, do: {:error, error}, else: :ok
      Enum.each(crew.awaiting_start, &GenServer.reply(&1, answer))
      %{crew | awaiting_start: []}
    end
  end

  @doc "The sidecar takes no more work; answers `from` when it has none left, of that which it has `taken`."
  @spec drain(t, index, GenServer.from(), [String.t()]) :: t
  def drain(crew, index, from, taken) do
    drains = Map.update(crew.drains, index, [from], &[from | &1])
    %{crew | drains: drains} |> update(index, draining?: true) |> drained(index, taken)
  end

  @doc "Answers those who wait for the sidecar to have no work left, where that is so."
  @spec drained(t, index, [String.t()]) :: t
  def drained(crew, index, []) do
    {waiting, drains} = Map.pop(crew.drains, index, [])
    Enum.each(waiting, &GenServer.reply(&1, :ok))
    %{crew | drains: drains}
  end

  def drained(crew, _index, _taken), do: crew

  @doc "Asks all sidecars at work, or the first that will be, for something; answers `from` when all have done it."
  @spec operate(t, String.t(), String.t(), GenServer.from()) :: t
  def operate(crew, type, model, from) do
    id = "#{type}-#{System.unique_integer([:positive])}"
    message = %{t: type, id: id, model: model}
    begin_operations(%{crew | operations: Operations.add(crew.operations, id, message, from)})
  end

  @doc "Begins the operations for which nobody was at work yet."
  @spec begin_operations(t) :: t
  def begin_operations(crew) do
    at_work = Fleet.at_work(crew.fleet)
    {messages, operations} = Operations.begin(crew.operations, Enum.map(at_work, & &1.index))
    for message <- messages, seat <- at_work, do: send_to_seat(seat, message)
    %{crew | operations: operations}
  end

  @doc "Whether an answer of a sidecar is to an operation."
  @spec operation?(t, String.t()) :: boolean
  def operation?(crew, id), do: Operations.known?(crew.operations, id)

  @doc "One of the sidecars has done its part of an operation, or has not for an error."
  @spec operated(t, String.t(), index, Error.t() | nil) :: t
  def operated(crew, id, index, error),
    do: crew.operations |> Operations.done(id, index, error) |> answer(crew)

  @doc "A sidecar does not do its part of any operation: it has ended."
  @spec operations_lost(t, index, String.t()) :: t
  def operations_lost(crew, index, sentence) do
    error = Error.new(:unavailable, sentence)
    crew.operations |> Operations.lost(index, Fleet.down?(crew.fleet), error) |> answer(crew)
  end

  defp answer({answers, operations}, crew) do
    for {from, answer} <- answers, do: GenServer.reply(from, answer)
    %{crew | operations: operations}
  end

  @doc """
  Whether a sidecar works on what none of the requests with these models waits for: an operation, or another load.
  """
  @spec other_work?(t, index, [String.t()]) :: boolean
  def other_work?(crew, index, models) do
    seat = get(crew, index)
    loads = for %{model: model} <- (seat.heartbeat && seat.heartbeat[:loads]) || [], do: model
    Operations.busy?(crew.operations, index) or loads -- models != []
  end
end
