defmodule StarweaveImage.Queue.Results do
  @moduledoc false
  # Which results of submitted requests are kept, to be asked for later. Each is kept for a time. Together they are
  # limited in number and in bytes; above that, the result that would expire first is dropped first. Results from
  # earlier runs of the application are on disk only; for these, the reader of each and its waiting callers are tracked.
  # Pure: the queue has the clocks and readers, and sends the answers.

  alias StarweaveImage.Queue.Job

  # `order`: `{until, number, id}` of each result; later ones have larger numbers. `readers`: reader → the id whose
  # result it reads from the disk.
  @enforce_keys [:max, :max_bytes]
  defstruct [
    :max,
    :max_bytes,
    kept: %{},
    order: :gb_sets.new(),
    number: 0,
    bytes: 0,
    readers: %{}
  ]

  @typedoc "A job that has ended, and its key in the order."
  @type kept :: {Job.t(), {until :: integer, number :: non_neg_integer}}
  @type reader :: term
  @type asker :: {:waiter, GenServer.from()} | {:subscriber, Job.subscriber()}
  @opaque t :: %__MODULE__{
            max: pos_integer,
            max_bytes: non_neg_integer,
            kept: %{String.t() => kept},
            order: term,
            number: non_neg_integer,
            bytes: non_neg_integer,
            readers: %{reader => String.t()}
          }

  @doc "Uses `:max_results` and `:max_result_bytes` of the instance's options."
  @spec new(keyword) :: t
  def new(config),
    do: %__MODULE__{max: config[:max_results], max_bytes: config[:max_result_bytes]}

  @doc "Keeps an ended job until a time. Returns the jobs that were dropped to make room, possibly this one itself."
  @spec keep(t, Job.t(), integer) :: {[Job.t()], t}
  def keep(results, job, until) do
    {_earlier, results} = drop(results, job.request.id)

    make_room(
      %{
        results
        | kept: Map.put(results.kept, job.request.id, {job, {until, results.number}}),
          order: :gb_sets.add({until, results.number, job.request.id}, results.order),
          number: results.number + 1,
          bytes: results.bytes + Job.bytes(job)
      },
      []
    )
  end

  defp make_room(results, gone) do
    if map_size(results.kept) > results.max or
         (results.bytes > results.max_bytes and results.kept != %{}) do
      {job, results} = drop_first(results)
      make_room(results, [job | gone])
    else
      {Enum.reverse(gone), results}
    end
  end

  defp drop_first(results) do
    {_until, _number, id} = :gb_sets.smallest(results.order)
    drop(results, id)
  end

  @doc "Drops the jobs that have expired at `now`, and returns them."
  @spec expire(t, integer) :: {[Job.t()], t}
  def expire(results, now) do
    case next_expiry(results) do
      until when until != nil and until <= now ->
        {job, results} = drop_first(results)
        {gone, results} = expire(results, now)
        {[job | gone], results}

      _later ->
        {[], results}
    end
  end

  @doc "When the next job expires; nil if none is kept."
  @spec next_expiry(t) :: integer | nil
  def next_expiry(%{kept: kept}) when kept == %{}, do: nil
  def next_expiry(results), do: results.order |> :gb_sets.smallest() |> elem(0)

  @spec get(t, String.t()) :: Job.t() | nil
  def get(results, id) do
    case results.kept do
      %{^id => {job, _place}} -> job
      _ -> nil
    end
  end

  @doc "Drops a job and its reader, and returns the job, or nil."
  @spec drop(t, String.t()) :: {Job.t() | nil, t}
  def drop(results, id) do
    case Map.pop(results.kept, id) do
      {nil, _kept} ->
        {nil, results}

      {{job, {until, number}}, kept} ->
        {job,
         %{
           results
           | kept: kept,
             order: :gb_sets.delete({until, number, id}, results.order),
             bytes: results.bytes - Job.bytes(job),
             readers: Map.reject(results.readers, fn {_reader, read} -> read == id end)
         }}
    end
  end

  @doc """
  Asks for a kept result. It is either delivered at once, by a job that has only the asker in it; or the asker waits
  until the result has been read from the disk, which the queue must begin (`:read`) or has begun already (`:wait`).
  """
  @spec ask(t, String.t(), asker) :: {:deliver, Job.t()} | {:read, t} | {:wait, t}
  def ask(results, id, asker) do
    {job, place} = Map.fetch!(results.kept, id)

    case job.result do
      {:stored, _outcome} ->
        kept = Map.put(results.kept, id, {asked(job, asker), place})
        results = %{results | kept: kept}
        read? = Enum.any?(results.readers, fn {_reader, read} -> read == id end)
        {if(read?, do: :wait, else: :read), results}

      _result ->
        {:deliver, asked(job, asker)}
    end
  end

  defp asked(job, {:waiter, from}), do: %{job | waiters: [from | job.waiters]}

  defp asked(job, {:subscriber, subscriber}),
    do: %{job | subscribers: Enum.uniq([subscriber | job.subscribers])}

  @doc "A subscriber no longer waits."
  @spec leave(t, String.t(), Job.subscriber()) :: t
  def leave(results, id, subscriber) do
    case results.kept do
      %{^id => {job, place}} ->
        job = %{job | subscribers: job.subscribers -- [subscriber]}
        %{results | kept: Map.put(results.kept, id, {job, place})}

      _ ->
        results
    end
  end

  @doc "A reader begins to read the result from the disk."
  @spec begin_reading(t, String.t(), reader) :: t
  def begin_reading(results, id, reader), do: put_in(results.readers[reader], id)

  @doc "A reader has finished. Returns the job with those who wait for it; nil if it is no longer needed."
  @spec end_reading(t, reader) :: {Job.t() | nil, t}
  def end_reading(results, reader) do
    with {id, readers} when id != nil <- Map.pop(results.readers, reader) do
      {job, place} = Map.fetch!(results.kept, id)
      told = %{job | waiters: [], subscribers: []}
      {job, %{results | readers: readers, kept: Map.put(results.kept, id, {told, place})}}
    else
      {nil, _readers} -> {nil, results}
    end
  end

  @doc "A reader is gone. Returns the id of the result it had not finished, which needs a new reader; or nil."
  @spec lose_reader(t, reader) :: {String.t() | nil, t}
  def lose_reader(results, reader) do
    {id, readers} = Map.pop(results.readers, reader)
    {id, %{results | readers: readers}}
  end

  @doc "The jobs whose results are being read, with those who wait for them."
  @spec being_read(t) :: [Job.t()]
  def being_read(results), do: for({_reader, id} <- results.readers, do: get(results, id))
end
