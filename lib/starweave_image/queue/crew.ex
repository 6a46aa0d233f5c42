defmodule StarweaveImage.Queue.Crew do
  @moduledoc false
  # The queue's sidecars as processes: monitors their owners, tells them their roles, sends them messages, lets spares
  # take over, runs operations on all of them, and answers callers that wait for a start, a drain or an operation. The
  # pure modules `Fleet`, which has the state of each sidecar, and `Operations` decide. Requests belong to the queue.

  require Logger

  alias StarweaveImage.{Error, Sidecar}
  alias StarweaveImage.Queue.{Fleet, Operations}

  # `awaiting_start` and `drains` hold the callers that wait for an answer, the latter by the index of a sidecar.
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

  @doc "The crew of an instance, before any sidecar reported. The calling process owns the table of `available?/1`."
  @spec new(keyword) :: t
  def new(config) do
    name = config[:name]
    :ets.new(table(name), [:named_table, :protected, read_concurrency: true])
    fleet = Fleet.new(config[:enabled], config[:layout])
    put(%__MODULE__{name: name, preload: config[:preload], fleet: fleet}, fleet)
  end

  @doc "Whether a sidecar is up, as last known. Reads a table, so it works even while the queue is busy."
  @spec available?(atom) :: boolean
  def available?(name) do
    :ets.lookup_element(table(name), :available?, 2)
  rescue
    # The queue is not running, so its table does not exist.
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

  @doc "Updates a sidecar, as `Fleet.update/3`."
  @spec update(t, index, map | keyword) :: t
  def update(crew, index, news), do: put(crew, Fleet.update(crew.fleet, index, news))

  @doc "A sidecar reports its own state, as in `Fleet.heard/3`."
  @spec heard(t, index, Fleet.news()) :: t
  def heard(crew, index, news), do: put(crew, Fleet.heard(crew.fleet, index, news))

  @doc "The options of a sidecar for `Schedule.sidecar/3`."
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

  ## Members

  @doc "Adds a sidecar with options of its own. The caller starts its owner."
  @spec add(t, keyword) :: {index, t}
  def add(crew, options) do
    {index, fleet} = Fleet.add(crew.fleet, options)
    {index, put(crew, fleet)}
  end

  @spec remove(t, index) :: t
  def remove(crew, index), do: put(crew, Fleet.remove(crew.fleet, index))

  @doc "Registers a sidecar's new owner; its predecessor must have been signed off."
  @spec sign_on(t, index, {birth :: integer, pid}) :: t
  def sign_on(crew, index, {birth, pid}) do
    # The owner was started with the role that the seat had at first, which may have changed since.
    Sidecar.set_role(pid, get(crew, index).role)
    update(crew, index, pid: pid, birth: birth, monitor: Process.monitor(pid))
  end

  @doc "Removes the owner of a sidecar, which is gone or being replaced; `:off` if there is none."
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

  @doc "The Python process of a sidecar has ended, or could not be started."
  @spec ended(t, index, atom, String.t()) :: t
  def ended(crew, index, phase, sentence),
    do: put(crew, Fleet.ended(crew.fleet, index, phase, sentence))

  @doc "Lets spares take over from active sidecars that are gone. Returns the indexes of all that changed."
  @spec relieve(t) :: {[index], t}
  def relieve(crew) do
    case Fleet.relieve(crew.fleet) do
      {:ok, gone, spare, fleet} ->
        %{pid: pid} = seat = Fleet.get(fleet, spare)
        Logger.info("image sidecar #{spare}, which stood by, takes over from #{gone}")
        if gone_pid = Fleet.get(fleet, gone).pid, do: Sidecar.set_role(gone_pid, :standby)
        Sidecar.set_role(pid, :active)

        # No caller waits for this operation: a request that needs the model waits for the same load.
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

  ## Waiting callers

  @doc "Answers `from` with `:ok` or an error once the start has succeeded or failed."
  @spec await_start(t, GenServer.from(), taken) :: t
  def await_start(crew, from, taken),
    do: settle(%{crew | awaiting_start: [from | crew.awaiting_start]}, taken)

  @doc "Answers the callers that wait for the start, once its outcome is known."
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

  @doc "Stops sending work to the sidecar; answers `from` when the requests it has `taken` are done."
  @spec drain(t, index, GenServer.from(), [String.t()]) :: t
  def drain(crew, index, from, taken) do
    drains = Map.update(crew.drains, index, [from], &[from | &1])
    %{crew | drains: drains} |> update(index, draining?: true) |> drained(index, taken)
  end

  @doc "Answers the callers that wait for the sidecar to drain, if it has no work left."
  @spec drained(t, index, [String.t()]) :: t
  def drained(crew, index, []) do
    {waiting, drains} = Map.pop(crew.drains, index, [])
    Enum.each(waiting, &GenServer.reply(&1, :ok))
    %{crew | drains: drains}
  end

  def drained(crew, _index, _taken), do: crew

  @doc """
  Starts an operation on all sidecars at work, or on the first that will be; answers `from` when all have done it.
  """
  @spec operate(t, String.t(), String.t(), GenServer.from()) :: t
  def operate(crew, type, model, from) do
    id = "#{type}-#{System.unique_integer([:positive])}"
    message = %{t: type, id: id, model: model}
    begin_operations(%{crew | operations: Operations.add(crew.operations, id, message, from)})
  end

  @doc "Begins the operations that waited for a sidecar to be at work."
  @spec begin_operations(t) :: t
  def begin_operations(crew) do
    at_work = Fleet.at_work(crew.fleet)
    {messages, operations} = Operations.begin(crew.operations, Enum.map(at_work, & &1.index))
    for message <- messages, seat <- at_work, do: send_to_seat(seat, message)
    %{crew | operations: operations}
  end

  @doc "Whether this id of a sidecar's answer belongs to an operation."
  @spec operation?(t, String.t()) :: boolean
  def operation?(crew, id), do: Operations.known?(crew.operations, id)

  @doc "One of the sidecars has done its part of an operation, or has failed with an error."
  @spec operated(t, String.t(), index, Error.t() | nil) :: t
  def operated(crew, id, index, error),
    do: crew.operations |> Operations.done(id, index, error) |> answer(crew)

  @doc "A sidecar has ended, so no operation waits for it any more."
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
  Whether a sidecar does work that no request for one of these models waits for: an operation, or another load.
  """
  @spec other_work?(t, index, [String.t()]) :: boolean
  def other_work?(crew, index, models) do
    seat = get(crew, index)
    loads = for %{model: model} <- (seat.heartbeat && seat.heartbeat[:loads]) || [], do: model
    Operations.busy?(crew.operations, index) or loads -- models != []
  end
end
