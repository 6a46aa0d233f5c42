defmodule StarweaveImage.Queue.Schedule do
  @moduledoc false
  # The order of the queue, without its processes, clocks and messages: whether there is room for a request, which
  # request runs next and where, and which has to make room for another.
  #
  # Waiting requests are ordered by priority, then by turn, then by age. Turns make the order fair: each request of a
  # user gets the turn after that of the user's previous one, and no request gets a turn that is over. So users of equal
  # priority are served in rotation, however many requests each has (start-time fair queueing with requests of equal
  # cost: Goyal, Vin, Cheng 1996). Requests without a user count as those of one user.
  #
  # A request keeps its place in the order until it ends, so one that returns from a dead sidecar is at the head again.
  # A request's slot at a sidecar is taken from dispatch until the sidecar says that it is free, even if the request
  # itself has ended or waits again meanwhile.
  #
  # A request that must run alone reserves a sidecar, which takes no other until the request has run there. Then a full
  # load of other requests follows, if any wait, then the next one that must run alone: neither kind starves the other.
  # Among those that must run alone, the one with the fewest reservations so far goes first.

  alias StarweaveImage.Queue.RankedSet

  defmodule Entry do
    @moduledoc false
    # `place`: `:waiting`, `:aside` (must not run yet), the index of its sidecar, or nil once it has ended. `attempts`
    # counts dispatches that ended with the sidecar's death, or that may still end so. `company`: `:any`, `:alone`, or
    # `:trial` (alone at a sidecar that has rested, while the other sidecars of the device rest too). `home`: the
    # sidecar that it has reserved.
    defstruct [
      :id,
      :key,
      :user,
      :model,
      :place,
      :home,
      bytes: 0,
      attempts: 0,
      company: :any,
      resting?: false,
      yields: 0,
      yielding?: false
    ]
  end

  defmodule Slots do
    @moduledoc false
    # The slots of one sidecar. `open?`: it is ready, active and not draining. `taken`: id → whether that request must
    # run alone. `sick`: grows with each death of the sidecar and shrinks with each request done. `shared`: how many
    # requests in company it has taken since the last one that ran alone there; `:any` if none has to go first.
    defstruct open?: false,
              capacity: 0,
              device: nil,
              taken: %{},
              resident: [],
              run_ms: nil,
              sick: 0,
              shared: :any
  end

  defstruct [
    :max_queue,
    :max_queue_bytes,
    waiting: RankedSet.new(),
    loners: RankedSet.new(),
    reserved: %{},
    entries: %{},
    turns: %{},
    served: %{},
    held: 0,
    bytes: 0,
    yielding: 0,
    sequence: 0,
    slots: %{},
    run_ms: 1_000,
    load_ms: 5_000
  ]

  # `waiting` holds the waiting requests that may run in company, `loners` the other waiting ones; `reserved` is
  # index → id.
  @type id :: String.t()
  @type company :: :any | :alone | :trial
  @type index :: pos_integer
  @type t :: %__MODULE__{}

  @classes %{interactive: 0, normal: 1, background: 2}
  # A background request that has made room this many times is not asked to do so again.
  @most_yields 3
  @most_sick 5
  # How many waiting requests the status lists.
  @next 20

  @spec new(keyword) :: t
  def new(config),
    do: struct!(__MODULE__, Keyword.take(config, [:max_queue, :max_queue_bytes]))

  ## Requests

  @doc "Whether there is room for a request of so many bytes; if not, about how many ms its wait would have been."
  @spec admit(t, non_neg_integer) :: :ok | {:overloaded, pos_integer}
  def admit(schedule, bytes) do
    if schedule.held < schedule.max_queue and schedule.bytes + bytes <= schedule.max_queue_bytes,
      do: :ok,
      else: {:overloaded, max(wait_ms(schedule, schedule.held + 1) || schedule.run_ms, 100)}
  end

  @doc "Adds a request, `:waiting` or `:aside`. Options: `:priority :user :model :bytes :company`."
  @spec push(t, id, :waiting | :aside, keyword) :: t
  def push(schedule, id, place, options) do
    {priority, options} = Keyword.pop(options, :priority, :normal)
    class = @classes[priority]
    {turn, schedule} = turn(schedule, {class, options[:user]})
    key = {class, {0, turn}, schedule.sequence, id}
    entry = struct!(Entry, [id: id, key: key] ++ options)

    put(
      %{
        schedule
        | sequence: schedule.sequence + 1,
          bytes: schedule.bytes + entry.bytes,
          held: schedule.held + 1
      },
      entry,
      place
    )
  end

  # `turns` holds the last turn given to each user of a class, until that turn is over.
  defp turn(schedule, {class, _} = user) do
    served = Map.get(schedule.served, class, 0)
    turn = max(Map.get(schedule.turns, user, -1) + 1, served)
    {turn, put_in(schedule.turns[user], turn)}
  end

  @doc "Whether the request is waiting or aside, or the index of the sidecar where it runs; nil if it is not known."
  @spec place(t, id) :: :waiting | :aside | index | nil
  def place(schedule, id), do: with(%{place: place} <- schedule.entries[id], do: place)

  @spec attempts(t, id) :: non_neg_integer
  def attempts(schedule, id), do: with(%{attempts: n} <- schedule.entries[id] || 0, do: n)

  @doc "Returns a request that is aside to the waiting ones."
  @spec resume(t, id) :: t
  def resume(schedule, id), do: move(schedule, id, :waiting)

  @doc """
  Returns a request to its place in the order, or puts it aside, for a reason: the sidecar `:died`, the request
  `:yielded`, the attempt `:failed`, or the sidecar was `:stopped` otherwise. Only a death counts as an attempt. The
  slot stays taken until `free/3`.
  """
  @spec return(t, id, :waiting | :aside, :died | :yielded | :failed | :stopped) :: t
  def return(schedule, id, place, reason) do
    entry = schedule.entries[id]

    entry =
      case reason do
        :died -> entry
        ended when ended in [:failed, :stopped] -> %{entry | attempts: entry.attempts - 1}
        :yielded -> %{entry | attempts: entry.attempts - 1, yields: entry.yields + 1}
      end

    schedule |> settled(entry) |> release(id) |> move(id, place)
  end

  @doc "Sets which company the request may have from its next attempt on."
  @spec company(t, id, company) :: t
  def company(schedule, id, company) do
    %{place: place} = entry = schedule.entries[id]
    schedule = if place == :waiting, do: unqueue(schedule, entry), else: schedule
    put(schedule, %{entry | company: company}, place)
  end

  @doc "Changes the model that the request needs."
  @spec use_model(t, id, String.t()) :: t
  def use_model(schedule, id, model), do: put_in(schedule.entries[id].model, model)

  @doc "The request has ended."
  @spec drop(t, id) :: t
  def drop(schedule, id) do
    case schedule.entries do
      %{^id => entry} ->
        schedule = schedule |> settled(entry) |> release(id) |> move(id, nil)

        %{
          schedule
          | entries: Map.delete(schedule.entries, id),
            bytes: schedule.bytes - entry.bytes
        }

      _ ->
        schedule
    end
  end

  # Clears the mark of a request that was asked to make room.
  defp settled(schedule, entry) do
    yielding = if entry.yielding?, do: schedule.yielding - 1, else: schedule.yielding
    entries = Map.put(schedule.entries, entry.id, %{entry | yielding?: false})
    %{schedule | entries: entries, yielding: yielding}
  end

  defp move(schedule, id, place) do
    %{place: from} = entry = schedule.entries[id]
    schedule = if from == :waiting, do: unqueue(schedule, entry), else: schedule
    held = schedule.held + held(place) - held(from)
    put(%{schedule | held: held}, entry, place)
  end

  defp put(schedule, entry, place) do
    schedule = put_in(schedule.entries[entry.id], %{entry | place: place})

    if place == :waiting,
      do: Map.update!(schedule, line(entry), &RankedSet.put(&1, entry.key)),
      else: schedule
  end

  defp unqueue(schedule, entry),
    do: Map.update!(schedule, line(entry), &RankedSet.delete(&1, entry.key))

  defp line(%{company: :any}), do: :waiting
  defp line(_loner), do: :loners

  defp held(place) when place in [:waiting, :aside], do: 1
  defp held(_place), do: 0

  ## Sidecars

  @doc "Updates a sidecar. Options: `:open? :capacity :device :resident`."
  @spec sidecar(t, index, keyword) :: t
  def sidecar(schedule, index, news) do
    slots = struct!(Map.get(schedule.slots, index, %Slots{}), news)
    schedule = put_in(schedule.slots[index], slots)
    if slots.open?, do: schedule, else: disappoint(schedule, index)
  end

  # Cancels the reservation of a request that stands aside for this sidecar: it waits for another one.
  defp disappoint(schedule, index) do
    case schedule.reserved do
      %{^index => id} ->
        case schedule.entries[id] do
          %{home: ^index, place: :aside} -> schedule |> release(id) |> move(id, :waiting)
          _ -> schedule
        end

      _ ->
        schedule
    end
  end

  @doc "The request for which the sidecar rests, or nil."
  @spec resting(t, index) :: id | nil
  def resting(schedule, index) do
    with id when id != nil <- schedule.reserved[index],
         %{home: ^index, resting?: true} <- schedule.entries[id],
         do: id,
         else: (_ -> nil)
  end

  @doc """
  The sidecar's process is gone. Returns the requests that ran there, oldest first; their places are not changed yet.
  """
  @spec lost(t, index) :: {[id], t}
  def lost(schedule, index) do
    case schedule.slots do
      %{^index => slots} ->
        # A process that died before it was ready failed to start, which says nothing about how it works.
        sick = if slots.open?, do: min(slots.sick + 1, @most_sick), else: slots.sick

        running =
          for {id, _} <- slots.taken,
              %{place: ^index} = entry <- [schedule.entries[id]],
              do: entry

        ids = running |> Enum.sort_by(& &1.key) |> Enum.map(& &1.id)

        # The requests in company that were to go first here ran on this process, so they have had their turn.
        shared = if is_map_key(schedule.reserved, index), do: slots.shared, else: :any
        gone = %{slots | open?: false, capacity: 0, taken: %{}, resident: [], sick: sick}
        gone = %{gone | shared: shared}
        {ids, disappoint(put_in(schedule.slots[index], gone), index)}

      _ ->
        {[], schedule}
    end
  end

  @spec remove_sidecar(t, index) :: t
  def remove_sidecar(schedule, index) do
    schedule = disappoint(schedule, index)
    reserved = Map.delete(schedule.reserved, index)
    %{schedule | slots: Map.delete(schedule.slots, index), reserved: reserved}
  end

  @doc "Frees the slot of a request: the sidecar no longer works on it."
  @spec free(t, index, id) :: t
  def free(schedule, index, id) do
    case schedule.slots do
      %{^index => slots} ->
        put_in(schedule.slots[index], %{slots | taken: Map.delete(slots.taken, id)})

      _ ->
        schedule
    end
  end

  @spec taken(t, index) :: [id]
  def taken(schedule, index), do: Map.keys(Map.get(schedule.slots, index, %Slots{}).taken)

  @doc "As `taken/2`, of all sidecars."
  @spec taken(t) :: %{index => [id]}
  def taken(schedule),
    do: Map.new(schedule.slots, fn {index, slots} -> {index, Map.keys(slots.taken)} end)

  @doc "A request took `run_ms` at this sidecar, of which loading a model took `load_ms`."
  @spec measure(t, index, non_neg_integer, non_neg_integer) :: t
  def measure(schedule, index, run_ms, load_ms) do
    run_ms = max(run_ms - load_ms, 0)
    load_ms = if load_ms > 0, do: mean(schedule.load_ms, load_ms), else: schedule.load_ms
    schedule = %{schedule | run_ms: mean(schedule.run_ms, run_ms), load_ms: load_ms}

    case schedule.slots do
      %{^index => slots} ->
        slots = %{
          slots
          | run_ms: mean(slots.run_ms || run_ms, run_ms),
            sick: max(slots.sick - 1, 0)
        }

        put_in(schedule.slots[index], slots)

      _ ->
        schedule
    end
  end

  defp mean(old, new), do: div(old * 4 + new, 5)

  ## Decisions

  @doc """
  The next action: run a request at a sidecar (its slot is then taken and the attempt counted); let a sidecar rest until
  `rested/2`, for a request on trial there; ask a background request to make room for an interactive one; or nothing.
  """
  @spec next(t) ::
          {:run, id, index, t} | {:rest, id, index, t} | {:yield, id, index, t} | :nothing
  def next(schedule) do
    case prepared(schedule) do
      {%{company: :trial} = entry, index} ->
        {:rest, entry.id, index, put_in(schedule.entries[entry.id], %{entry | resting?: true})}

      {entry, index} ->
        run(schedule, entry, index)

      nil ->
        {first, loner} = {RankedSet.first(schedule.waiting), RankedSet.first(schedule.loners)}
        due? = loner != nil and (first == nil or elem(loner, 0) <= elem(first, 0))

        case if(due?, do: reserve(schedule, loner)) do
          nil -> next(schedule, first)
          schedule -> next(schedule)
        end
    end
  end

  defp next(_schedule, nil), do: :nothing

  defp next(schedule, {class, _, _, id}) do
    entry = schedule.entries[id]

    case best(schedule, entry, &room?(schedule, &1, &2, entry)) do
      nil when class == 0 -> step_back(schedule, entry)
      nil -> :nothing
      index -> run(schedule, entry, index)
    end
  end

  # A request whose reserved sidecars are all empty now.
  defp prepared(schedule) do
    Enum.find_value(schedule.reserved, fn {index, id} ->
      case schedule.entries[id] do
        %{home: ^index, place: :aside, resting?: false} = entry ->
          if Enum.all?(reserved(schedule, id), &(map_size(schedule.slots[&1].taken) == 0)),
            do: {entry, index}

        _ ->
          nil
      end
    end)
  end

  defp reserved(schedule, id), do: for({index, ^id} <- schedule.reserved, do: index)

  defp reserve(schedule, {class, {times, turn}, sequence, id}) do
    entry = schedule.entries[id]
    alone? = RankedSet.size(schedule.waiting) == 0

    free? = fn index, slots ->
      slots.open? and slots.capacity > 0 and not is_map_key(schedule.reserved, index) and
        not lone?(slots) and (alone? or slots.shared == :any or slots.shared >= slots.capacity)
    end

    with home when home != nil <- best(schedule, entry, free?),
         indices = if(entry.company == :trial, do: peers(schedule, home), else: [home]),
         false <- Enum.any?(indices, &is_map_key(schedule.reserved, &1)) do
      schedule = %{move(schedule, id, :aside) | reserved: mark(schedule.reserved, indices, id)}
      key = {class, {times + 1, turn}, sequence, id}
      update_in(schedule.entries[id], &%{&1 | home: home, key: key})
    else
      _ -> nil
    end
  end

  defp mark(reserved, indices, id), do: for(index <- indices, into: reserved, do: {index, id})

  # The sidecars that share the device of `home`, and so its memory.
  defp peers(schedule, home) do
    %{device: device} = schedule.slots[home]
    for {index, %{open?: true, device: ^device}} <- schedule.slots, do: index
  end

  # Frees the request's reservations; requests in company go next there.
  defp release(schedule, id) do
    case schedule.entries[id] do
      %{home: nil} ->
        schedule

      entry ->
        slots =
          for index <- reserved(schedule, id), reduce: schedule.slots do
            slots -> Map.update!(slots, index, &%{&1 | shared: 0})
          end

        reserved = Map.reject(schedule.reserved, fn {_, by} -> by == id end)
        entries = Map.put(schedule.entries, id, %{entry | home: nil, resting?: false})
        %{schedule | slots: slots, reserved: reserved, entries: entries}
    end
  end

  @doc "The sidecar has rested for the request, which is the next to run there."
  @spec rested(t, id) :: t
  def rested(schedule, id) do
    case schedule.entries do
      %{^id => %{resting?: true} = entry} ->
        put_in(schedule.entries[id], %{entry | resting?: false, company: :alone})

      _ ->
        schedule
    end
  end

  defp run(schedule, %{id: id, key: {class, {_, turn}, _, _}} = entry, index) do
    alone? = entry.company != :any

    schedule =
      schedule
      |> put_in([Access.key(:entries), id], %{entry | attempts: entry.attempts + 1})
      |> move(id, index)
      |> update_in([Access.key(:slots), index], &take(&1, id, alone?))

    {:run, id, index, turn_over(schedule, class, turn)}
  end

  defp take(slots, id, alone?) do
    shared = if alone? or slots.shared == :any, do: slots.shared, else: slots.shared + 1
    %{slots | taken: Map.put(slots.taken, id, alone?), shared: shared}
  end

  # A user's next request gets the turn after the user's last one, or the turn served now if that is later. So a last
  # turn before the one served now no longer matters, and is forgotten.
  defp turn_over(schedule, class, turn) do
    if turn > Map.get(schedule.served, class, 0) do
      turns = Map.reject(schedule.turns, fn {{of, _}, last} -> of == class and last < turn end)
      %{schedule | served: Map.put(schedule.served, class, turn), turns: turns}
    else
      schedule
    end
  end

  defp best(schedule, entry, fits?) do
    schedule.slots
    |> Enum.filter(fn {index, slots} -> fits?.(index, slots) end)
    |> Enum.min_by(fn {index, slots} -> {expected_ms(schedule, slots, entry), index} end, fn ->
      nil
    end)
    |> then(&(&1 && elem(&1, 0)))
  end

  # A new request with the id of a cancelled one must not use this sidecar until the sidecar has freed that slot.
  defp room?(schedule, index, slots, entry) do
    slots.open? and map_size(slots.taken) < slots.capacity and
      not is_map_key(schedule.reserved, index) and not is_map_key(slots.taken, entry.id) and
      not lone?(slots)
  end

  defp lone?(slots), do: Enum.any?(slots.taken, fn {_, alone?} -> alone? end)

  # When the request would be done there: from the usual run time at that sidecar and the number of its requests, plus a
  # load if the model is not in its memory; doubled for each point of `sick`.
  defp expected_ms(schedule, slots, entry) do
    run = (slots.run_ms || schedule.run_ms) * (map_size(slots.taken) + 1) / slots.capacity
    load = if entry.model in slots.resident, do: 0, else: schedule.load_ms
    (run + load) * Integer.pow(2, slots.sick)
  end

  # As many background requests make room as there are interactive ones waiting, the youngest first: they have the least
  # work to lose.
  defp step_back(schedule, waiting) do
    wanted = RankedSet.rank(schedule.waiting, {0, {:infinity, 0}, 0, ""})

    candidates =
      for {index, %{open?: true} = slots} <- schedule.slots,
          # A reserved sidecar takes no other request, so room there would not help.
          not is_map_key(schedule.reserved, index),
          # A request that runs alone had to wait for an empty sidecar, and is not asked to make room.
          {id, false} <- slots.taken,
          id != waiting.id,
          %{key: {2, _, _, _}, place: ^index, yielding?: false} = entry <- [schedule.entries[id]],
          entry.yields < @most_yields,
          do: entry

    case candidates do
      [_ | _] when schedule.yielding < wanted ->
        entry = Enum.max_by(candidates, & &1.key)
        entries = Map.put(schedule.entries, entry.id, %{entry | yielding?: true})
        schedule = %{schedule | entries: entries, yielding: schedule.yielding + 1}
        {:yield, entry.id, entry.place, schedule}

      _ ->
        :nothing
    end
  end

  @doc "Whether the request was asked to make room and has not done so yet."
  @spec yielding?(t, id) :: boolean
  def yielding?(schedule, id), do: match?(%{yielding?: true}, schedule.entries[id])

  ## What callers see

  @spec waiting(t) :: non_neg_integer
  def waiting(schedule), do: schedule.held

  @spec bytes(t) :: non_neg_integer
  def bytes(schedule), do: schedule.bytes

  @doc "The queue, for `StarweaveImage.status/1`."
  @spec status(t) :: map
  def status(schedule) do
    next =
      for {id, position} <- schedule |> order(@next) |> Enum.with_index(1),
          do: %{id: id, position: position, estimated_start_ms: wait_ms(schedule, position)}

    %{
      queued: schedule.held,
      running: Enum.sum(for {_, slots} <- schedule.slots, do: map_size(slots.taken)),
      limit: schedule.max_queue,
      bytes: schedule.bytes,
      max_bytes: schedule.max_queue_bytes,
      estimated_start_ms: wait_ms(schedule, schedule.held + 1),
      # A short list is enough for a status: subscribers learn the place of a request by its events.
      next: next
    }
  end

  @doc "Waiting requests in the order in which they will run, all or the first few."
  @spec order(t, non_neg_integer | :all) :: [id]
  def order(schedule, count \\ :all)

  def order(schedule, :all), do: in_order(schedule, &RankedSet.to_list/1)

  def order(schedule, count),
    do: schedule |> in_order(&RankedSet.take(&1, count)) |> Enum.take(count)

  defp in_order(%{waiting: waiting, loners: loners}, keys) do
    keys = :lists.merge(keys.(waiting), keys.(loners))
    for {_, _, _, id} <- keys, do: id
  end

  @doc "The position of a request among the waiting ones, from 1; for one that is aside, as if it waited."
  @spec position(t, id) :: pos_integer
  def position(schedule, id) do
    %{key: key, place: place} = schedule.entries[id]
    rank = RankedSet.rank(schedule.waiting, key) + RankedSet.rank(schedule.loners, key)
    if place == :waiting, do: rank, else: rank + 1
  end

  @doc """
  About how many ms until the request at this position begins, by the mean duration of recent requests; nil while no
  sidecar is open.
  """
  @spec wait_ms(t, pos_integer) :: non_neg_integer | nil
  def wait_ms(schedule, position) do
    open =
      for {_, %{open?: true, capacity: capacity} = slots} when capacity > 0 <- schedule.slots,
          do: slots

    case open |> Enum.map(& &1.capacity) |> Enum.sum() do
      0 ->
        nil

      capacity ->
        free = Enum.sum(for slots <- open, do: max(slots.capacity - map_size(slots.taken), 0))
        # Each slot becomes free once per mean run time.
        div(max(position - free, 0) * schedule.run_ms, capacity)
    end
  end
end
