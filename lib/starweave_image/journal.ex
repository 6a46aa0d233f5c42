defmodule StarweaveImage.Journal do
  @moduledoc false

  # What must survive when the BEAM of an instance is killed: the requests that it accepted, how often each was begun,
  # and how each ended. docs/journal.md says what is promised and what is in the folder.
  #
  # A caller never blocks on a disk: the message `{:journal, {operation, id}, :ok | {:error, sentence}}` tells it when
  # its record is durable, or that it is not. All records that wait are written together and synced once.
  #
  # Memory holds only the places of the records, by id.

  use GenServer
  use StarweaveImage.CrashLog
  require Logger

  alias StarweaveImage.{Error, Result, Telemetry}
  alias StarweaveImage.Journal.{Folder, Lock, Log, Record}

  @group 64
  @compact_above 1024 * 1024
  # How many `damaged-…` and how many `quarantined-…` files are kept.
  @kept_aside 4
  # How many unusable records the log names one by one.
  @named 20
  @retry_ms 1_000
  # How soon a removed folder is noticed while there is nothing to write.
  @watch_ms 10_000

  defstruct [
    :folder,
    :instance,
    :compact_above,
    :compact_at,
    :file,
    :problem,
    :timer,
    :lock,
    :user,
    open?: false,
    size: 0,
    index: %{},
    kept: [],
    damaged: 0,
    batch: [],
    unlogged: [],
    unended: %{},
    refused: []
  ]

  @type operation :: :accept | :attempt | :finish | :forget
  @type result :: {:ok, [Result.any_kind()]} | {:error, Error.t()}
  @type unfinished :: %{id: String.t(), job: map, attempts: non_neg_integer}
  @type finished :: %{id: String.t(), finished_at: integer, outcome: :ok | :error}

  @doc """
  Starts the journal of a `:folder`, registered as `:name`.

  It also starts if the folder cannot be used; then every operation fails with the reason, and the folder is tried
  again. `:instance` is for telemetry; above `:compact_above` bytes a log that is mostly dead is written anew.
  """
  @spec start_link(keyword) :: GenServer.on_start()
  def start_link(opts) do
    # The state holds no large binaries, but the last ones that were written may stay in the heap.
    GenServer.start_link(__MODULE__, opts, name: opts[:name], hibernate_after: 5_000)
  end

  @doc """
  All requests of the journal: unfinished ones in the order of their acceptance, finished ones in the order of their
  ends.

  After an error the caller is told by `{:journal, :open, :ok}` when the folder can be used, to ask again. The last one
  who asked is told by `{:journal, :health, nil | sentence}` whenever it can be used no more, or again.
  """
  @spec recover(GenServer.server()) ::
          %{unfinished: [unfinished], finished: [finished], damaged: non_neg_integer}
          | {:error, String.t()}
  def recover(journal), do: call(journal, :recover)

  @doc """
  Records an accepted request. `job` is a map of types that MessagePack knows, with text as keys; binaries may hold any
  bytes.

  An unfinished request of this id keeps its job, since the same id is the same request. A finished one starts anew.
  """
  @spec accept(GenServer.server(), String.t(), map) :: :ok
  def accept(journal, id, job) when is_binary(id), do: cast(journal, {:accept, id, job})

  @doc "Records that a request was begun for the n-th time; ignored if it is unknown or finished."
  @spec attempt(GenServer.server(), String.t(), pos_integer) :: :ok
  def attempt(journal, id, n) when is_binary(id), do: cast(journal, {:attempt, id, n})

  @doc "Records how a request ended; ignored if it is unknown. Of several ends the last one counts."
  @spec finish(GenServer.server(), String.t(), result) :: :ok
  def finish(journal, id, result) when is_binary(id),
    do: cast(journal, {:finish, id, System.system_time(:millisecond), result})

  @doc "Forgets a request, finished or not; ignored if it is unknown."
  @spec forget(GenServer.server(), String.t()) :: :ok
  def forget(journal, id) when is_binary(id), do: cast(journal, {:forget, id})

  @doc "The job of a request, finished or not, as it was accepted."
  @spec job(GenServer.server(), String.t()) :: {:ok, unfinished} | {:error, String.t()}
  def job(journal, id), do: call(journal, {:job, id})

  @doc """
  The result of a finished request, read and checked in the calling process.

  If an image file is missing or damaged, its request counts as unfinished again.
  """
  @spec result(GenServer.server(), String.t()) ::
          {:ok, result} | {:unfinished, unfinished} | {:error, String.t()}
  def result(journal, id) do
    with :damaged <- read_result(call(journal, {:result, id})),
         :damaged <- read_result(call(journal, {:check, id})) do
      {:error, "its files change while they are read"}
    end
  end

  defp read_result({:finished, _folder, {:error, error}}), do: {:ok, {:error, error}}

  defp read_result({:finished, folder, {:ok, images}}) do
    images
    |> Enum.reduce_while([], fn {image, blob}, read ->
      case Folder.read_blob(folder, blob) do
        {:ok, data} -> {:cont, [Result.put_data(image, data) | read]}
        bad -> {:halt, bad}
      end
    end)
    |> case do
      :damaged -> :damaged
      {:error, reason} -> {:error, sentence(reason)}
      images -> {:ok, {:ok, Enum.reverse(images)}}
    end
  end

  defp read_result(other), do: other

  defp cast(journal, record), do: GenServer.cast(journal, {:append, self(), record})

  defp call(journal, request) do
    GenServer.call(journal, request, :infinity)
  catch
    :exit, _reason -> {:error, "the journal does not run"}
  end

  ## The process

  @impl true
  def init(opts) do
    # So that `terminate/2` runs, after everything that was asked for before.
    Process.flag(:trap_exit, true)
    Logger.metadata(instance: opts[:instance])
    compact_above = opts[:compact_above] || @compact_above

    state = %__MODULE__{
      folder: Path.expand(opts[:folder]),
      instance: opts[:instance],
      compact_above: compact_above,
      compact_at: compact_above
    }

    Process.send_after(self(), :watch, @watch_ms)
    {:ok, state, {:continue, :open}}
  end

  @impl true
  def terminate(reason, state) when reason in [:normal, :shutdown],
    do: state |> commit() |> end_again()

  def terminate(_reason, _state), do: :ok

  @impl true
  def handle_continue(:open, state), do: state |> try_open() |> noreply()

  @impl true
  def handle_cast({:append, pid, record}, state) do
    state = %{state | batch: [{pid, record} | state.batch]}
    noreply(if length(state.batch) >= @group, do: commit(state), else: state)
  end

  @impl true
  def handle_info(:timeout, state), do: state |> commit() |> noreply()
  def handle_info(:open, state), do: %{state | timer: nil} |> try_open() |> noreply()

  def handle_info(:watch, state) do
    Process.send_after(self(), :watch, @watch_ms)
    state |> try_open() |> end_again() |> noreply()
  end

  def handle_info(_message, state), do: noreply(state)

  @impl true
  def handle_call(request, {pid, _}, state) do
    state = if request == :recover, do: %{state | user: pid}, else: state

    case state |> commit() |> usable() do
      {:ok, state} ->
        {answer, state} = answer(request, state)
        {:reply, answer, state}

      {:error, reason, state} ->
        told = if request == :recover, do: Enum.uniq([pid | state.refused]), else: state.refused
        {:reply, {:error, sentence(reason)}, %{state | refused: told}}
    end
  end

  # The timeout of 0 fires when the mailbox is empty: everything that waited there is written as one group.
  defp noreply(%{batch: []} = state), do: {:noreply, state}
  defp noreply(state), do: {:noreply, state, 0}

  defp answer(:recover, state) do
    {finished, unfinished} =
      Enum.split_with(in_order(state.index), fn {_, entry} -> entry.finish end)

    finished =
      for {id, %{finish: %{at: at, outcome: outcome}}} <- finished,
          do: %{id: id, finished_at: at, outcome: outcome}

    jobs = for {id, entry} <- unfinished, do: job(state, id, entry)
    lost = Enum.count(jobs, &(&1 == {:error, :damaged}))
    if lost > 0, do: report(state, lost, 0)

    case Enum.find(jobs, &(match?({:error, _}, &1) and &1 != {:error, :damaged})) do
      {:error, reason} ->
        {{:error, sentence(reason)}, state}

      nil ->
        {%{
           unfinished: for({:ok, job} <- jobs, do: job),
           finished: Enum.sort_by(finished, & &1.finished_at),
           damaged: state.damaged + lost
         }, state}
    end
  end

  defp answer({:job, id}, state) do
    answer =
      case state.index do
        %{^id => %{accept: place} = entry} when place != nil -> job(state, id, entry)
        _ -> {:error, :unknown}
      end

    with {:error, reason} <- answer,
         do: {{:error, sentence(reason)}, state},
         else: (_ -> {answer, state})
  end

  defp answer({:check, id}, state) do
    case check_images(state, Map.take(state.index, [id])) do
      {:ok, state} -> answer({:result, id}, state)
      {:error, reason} -> {{:error, sentence(reason)}, state}
    end
  end

  defp answer({:result, id}, state) do
    answer =
      case state.index do
        %{^id => %{finish: nil} = entry} ->
          with {:ok, job} <- job(state, id, entry), do: {:unfinished, job}

        %{^id => %{finish: %{place: place}}} ->
          with {:ok, {:finish, _id, _at, outcome}} <- read_record(state.file, place),
               do: {:finished, state.folder, outcome}

        _ ->
          {:error, :unknown}
      end

    with {:error, reason} <- answer,
         do: {{:error, sentence(reason)}, state},
         else: (_ -> {answer, state})
  end

  defp job(state, id, %{accept: place, attempts: attempts}) do
    with {:ok, {:accept, _id, job}} <- read_record(state.file, place),
         do: {:ok, %{id: id, job: job, attempts: attempts}}
  end

  defp read_record(file, place) do
    with {:ok, payload} <- Log.payload(reader(file), place),
         {:ok, record} <- Record.cast(payload) do
      {:ok, record}
    else
      {:error, reason} -> {:error, reason}
      _damaged -> {:error, :damaged}
    end
  end

  ## The index: where the records of each request are

  defp note(index, {:accept, id, _job}, place) do
    case index do
      %{^id => %{finish: nil}} -> index
      _ -> Map.put(index, :binary.copy(id), %{accept: place, attempts: 0, finish: nil})
    end
  end

  defp note(index, {:attempt, id, n}, _place) do
    case index do
      %{^id => entry} -> %{index | id => %{entry | attempts: n}}
      _ -> index
    end
  end

  # A result without its request comes from a log that lost the request's record: it is still a result.
  defp note(index, {:finish, id, at, outcome}, place) do
    blobs =
      with {:ok, images} <- outcome,
           do: for({_image, blob} <- images, do: :binary.copy(blob)),
           else: (_ -> [])

    entry = Map.get(index, id, %{accept: nil, attempts: 0, finish: nil})
    finish = %{place: place, at: at, blobs: blobs, outcome: elem(outcome, 0)}
    Map.put(index, :binary.copy(id), %{entry | finish: finish})
  end

  defp note(index, {:forget, id}, _place), do: Map.delete(index, id)

  defp blobs(%{finish: %{blobs: blobs}}), do: blobs
  defp blobs(_entry), do: []

  defp used_blobs(state) do
    of_newer = for {_place, blobs} <- state.kept, blob <- blobs, do: blob
    Enum.flat_map(Map.values(state.index), &blobs/1) ++ of_newer
  end

  defp places(entry),
    do: Enum.reject([entry.accept, entry.finish && entry.finish.place], &is_nil/1)

  defp in_order(index), do: Enum.sort_by(index, fn {_id, entry} -> hd(places(entry)) end)

  ## Appending

  defp commit(%{batch: []} = state), do: state

  defp commit(state) do
    batch = Enum.reverse(state.batch)

    case usable(%{state | batch: []}) do
      {:ok, state} ->
        append(state, batch)

      {:error, reason, state} ->
        for {pid, record} <- batch, do: tell(pid, record, {:error, reason})

        batch
        |> Enum.reduce(state, &superseded/2)
        |> unended(for({_pid, record} <- batch, do: record))
    end
  end

  defp append(state, batch) do
    state = Enum.reduce(batch, state, &superseded/2)
    unlogged = for id <- state.unlogged, do: {nil, {:forget, id}}
    group = %{index: state.index, size: state.size, bytes: [], blobs: [], answers: [], failed: []}
    group = Enum.reduce(unlogged ++ batch, group, &join(&2, &1, state))
    touched = for {_pid, record} <- batch, do: blobs(state.index[elem(record, 1)])

    {result, state} =
      case write(state.file, state.size, group.bytes) do
        :ok -> appended(state, group, batch)
        {:error, reason} -> {{:error, reason}, not_appended(state, batch, reason)}
      end

    state = unended(state, group.failed)
    drop_blobs(state, Enum.concat([group.blobs | touched]))

    for {pid, record, answer} <- Enum.reverse(group.answers),
        do: tell(pid, record, if(answer == :ok, do: result, else: answer))

    if state.file && state.size > state.compact_at, do: compact(state), else: state
  end

  # Records of the journal itself have no pid to answer, and are always written.
  defp join(group, {pid, record}, state) do
    case if(pid, do: admit(record, group.index[elem(record, 1)]), else: :ok) do
      :ignored ->
        answered(group, pid, record, :ok)

      :ok ->
        {stored, group} = store(group, record, state)

        with {:ok, stored} <- stored,
             {:ok, payload} <- Record.encode(stored),
             {:ok, bytes} <- Log.record(payload) do
          size = IO.iodata_length(bytes)
          index = note(group.index, stored, {group.size, size})
          group = %{group | index: index, size: group.size + size, bytes: [group.bytes, bytes]}
          answered(group, pid, record, :ok)
        else
          # It would be too large the next time, too.
          {:error, reason} when reason in [:unencodable, :too_large] ->
            answered(group, pid, record, {:error, reason})

          error ->
            answered(%{group | failed: [record | group.failed]}, pid, record, error)
        end
    end
  end

  defp answered(group, pid, record, answer),
    do: %{group | answers: [{pid, record, answer} | group.answers]}

  defp admit({:accept, _, _}, %{finish: nil}), do: :ignored
  defp admit({:accept, _, _}, _finished), do: :ok
  defp admit(_record, nil), do: :ignored
  defp admit({:attempt, _, _}, %{finish: finish}) when finish != nil, do: :ignored
  defp admit(_record, _known), do: :ok

  # Images are written before the record that refers to them.
  defp store(group, {:finish, id, at, {:ok, images}}, state) do
    {images, blobs} =
      Enum.map_reduce(images, [], fn image, blobs ->
        case Folder.put_blob(state.folder, Result.data(image)) do
          {:ok, blob} -> {{image, blob}, [blob | blobs]}
          error -> {error, blobs}
        end
      end)

    error = Enum.find(images, &match?({:error, _}, &1))
    {error || {:ok, {:finish, id, at, {:ok, images}}}, %{group | blobs: blobs ++ group.blobs}}
  end

  defp store(group, record, _state), do: {{:ok, record}, group}

  defp write(_file, _offset, []), do: :ok

  defp write(file, offset, bytes) do
    with :ok <- :file.pwrite(file, offset, bytes), do: :file.datasync(file)
  end

  defp appended(state, %{bytes: []}, _batch), do: {:ok, state}

  # The bytes are written, but if the file was removed meanwhile, no later start would find them.
  defp appended(state, group, batch) do
    case usable(%{state | index: group.index, size: group.size}) do
      {:ok, written} ->
        {:ok, healthy(%{written | unlogged: []})}

      {:error, reason, unplaced} ->
        _ = if unplaced.file, do: set_size(unplaced.file, state.size)
        kept = Map.take(state, [:index, :size, :unlogged])
        {{:error, reason}, unwritten(Map.merge(unplaced, kept), batch)}
    end
  end

  defp not_appended(state, batch, reason) do
    :file.close(state.file)
    state = trouble(unwritten(%{state | file: nil}, batch), reason)

    # This cuts off the part of the group that was written.
    try_open(state)
  end

  # Forgotten requests stay forgotten and are logged with the next group: deleting their files makes room for that.
  defp unwritten(state, batch) do
    forgotten = for {_pid, {:forget, id}} <- batch, is_map_key(state.index, id), do: id
    unlogged = Enum.uniq(state.unlogged ++ forgotten)
    state = %{state | index: Map.drop(state.index, forgotten), unlogged: unlogged}
    unended(state, for({_pid, record} <- batch, do: record))
  end

  # A caller is told of an end that cannot be written. The write is repeated until it succeeds, because otherwise the
  # next start would do the request again.
  defp unended(state, records) do
    ends = for {:finish, id, _at, _result} = record <- records, into: %{}, do: {id, record}
    %{state | unended: Map.merge(state.unended, ends)}
  end

  defp superseded({_pid, record}, state) when elem(record, 0) in [:finish, :forget],
    do: %{state | unended: Map.delete(state.unended, elem(record, 1))}

  defp superseded(_record, state), do: state

  defp end_again(%{unended: unended} = state) when unended == %{} or state.file == nil, do: state

  defp end_again(%{unended: unended} = state) do
    ends = for {id, record} <- unended, match?(%{finish: nil}, state.index[id]), do: {nil, record}

    case usable(%{state | unended: %{}}) do
      {:ok, state} -> append(state, ends)
      {:error, _reason, state} -> %{state | unended: unended}
    end
  end

  # The image files that no result refers to any more.
  defp drop_blobs(_state, []), do: :ok

  defp drop_blobs(state, blobs) do
    used = MapSet.new(used_blobs(state))
    for blob <- blobs, blob not in used, do: Folder.delete_blob(state.folder, blob)
  end

  defp tell(nil, _record, _answer), do: :ok

  defp tell(pid, record, answer) do
    answer = with {:error, reason} <- answer, do: {:error, sentence(reason)}
    send(pid, {:journal, {elem(record, 0), elem(record, 1)}, answer})
  end

  ## Opening

  defp try_open(state) do
    with {:error, _reason, state} <- usable(state), do: state, else: ({:ok, state} -> state)
  end

  defp usable(%{file: nil} = state) do
    with {:ok, state} <- held(state),
         {:ok, state} <- with_file(state) do
      # The file is closed again if its new name could not be made durable.
      usable(state)
    else
      {:error, reason} -> closed(state, reason)
      {:error, reason, state} -> closed(state, reason)
    end
  end

  # The file is open, but the folder may have been removed or replaced. Then the folder is made again and everything
  # acknowledged is written there: the open file has all of it, since its bytes stay until it is closed.
  defp usable(state) do
    if locked?(state) and place_of_file(state) == :here do
      {:ok, state}
    else
      with {:ok, state} <- held(state),
           {:ok, state} <- placed(state, place_of_file(state)) do
        usable(healthy(state))
      else
        {:error, reason} -> closed(state, reason)
        {:error, reason, state} -> closed(state, reason)
      end
    end
  end

  # Another journal may use the folder only after this process has ended.
  defp held(state) do
    with :ok <- Folder.create(state.folder),
         {:ok, was_open?} <- Folder.close(state.folder) do
      if was_open?,
        do:
          Logger.warning(
            "others could look into #{state.folder}; the journal there is for its owner alone now"
          )

      if locked?(state) do
        {:ok, state}
      else
        with {:ok, lock} <- Lock.take(state.folder), do: {:ok, %{state | lock: lock}}
      end
    end
  end

  defp locked?(%{lock: nil}), do: false
  defp locked?(state), do: match?({:ok, _}, File.lstat(path(state, state.lock)))

  # Whether the journal's name still leads to the file that is written to.
  defp place_of_file(state) do
    with {:ok, info} <- :file.read_file_info(state.file),
         {:ok, there} <- File.stat(path(state, "journal")) do
      ours = File.Stat.from_record(info)

      cond do
        {ours.inode, ours.major_device} != {there.inode, there.major_device} -> :another
        ours.size == state.size -> :here
        true -> :changed
      end
    else
      {:error, :enoent} -> :nowhere
      error -> error
    end
  end

  defp placed(state, :here), do: {:ok, state}
  defp placed(_state, :another), do: {:error, :replaced}

  defp placed(state, :changed) do
    Logger.error("somebody else has written to the journal in #{state.folder}, or cut it")
    load(state, state.file)
  end

  defp placed(state, :nowhere) do
    Logger.error("somebody has removed the journal in #{state.folder}: it is written there anew")
    write_anew(state)
  end

  defp placed(_state, error), do: error

  defp with_file(state) do
    # Not with :append: a group is written at its own place, over the rest of a group that failed.
    with {:ok, file} <- :file.open(path(state, "journal"), [:read, :write, :raw, :binary]),
         _ = File.chmod(path(state, "journal"), 0o600),
         {:error, reason} <- if(state.open?, do: reopen(state, file), else: load(state, file)) do
      :file.close(file)
      {:error, reason, state}
    else
      {:ok, state} -> {:ok, state}
      {:error, reason} -> {:error, reason, state}
    end
  end

  defp closed(state, reason) do
    timer = state.timer || Process.send_after(self(), :open, @retry_ms)
    {:error, reason, trouble(%{state | timer: timer}, reason)}
  end

  # The log says it once, not for every request.
  defp trouble(state, reason) do
    sentence = sentence(reason)

    if state.problem != sentence do
      Logger.error("the journal in #{state.folder} cannot be used: #{sentence}")
      tell_health(state, sentence)
    end

    %{state | problem: sentence}
  end

  defp healthy(%{problem: nil} = state), do: state

  defp healthy(state) do
    Logger.info("the journal in #{state.folder} can be used now")
    tell_health(state, nil)
    %{state | problem: nil}
  end

  defp tell_health(state, problem),
    do: state.user && send(state.user, {:journal, :health, problem})

  defp load(state, file) do
    _ = File.rm(path(state, "journal.new"))
    read = %{index: %{}, kept: [], rejected: []}

    with {:ok, size} <- :file.position(file, :eof),
         {:ok, read, %{damaged: damaged, torn: torn}} <-
           Log.fold(reader(file), size, read, &replay/3),
         :ok <- set_size(file, size - torn),
         rejected = Enum.reverse(read.rejected),
         state = %{state | file: file, size: size - torn, index: read.index, kept: read.kept},
         state = %{state | damaged: damaged + length(rejected)},
         {:ok, state} <- check_images(state, state.index),
         :ok <- Folder.sweep(state.folder, used_blobs(state)) do
      cut =
        "the last #{torn} bytes of the journal in #{state.folder} were never written to their end"

      if torn > 0, do: Logger.info(cut)
      for pid <- state.refused, do: send(pid, {:journal, :open, :ok})
      state = healthy(%{state | open?: true, refused: []})
      tell_newer(state)
      bad = damaged + length(rejected)
      if bad > 0, do: report(state, bad, 0)
      quarantined = rejected == [] or quarantine(state, rejected)
      kept = damaged == 0 or keep_aside(state)

      state =
        cond do
          not (quarantined and kept) ->
            compact(%{state | kept: state.kept ++ places_of(rejected)})

          bad > 0 ->
            rewrite(state)

          true ->
            compact(state)
        end

      {:ok, end_unreadable(state, rejected)}
    end
  end

  defp reopen(state, file) do
    case :file.position(file, :eof) do
      {:ok, size} when size >= state.size ->
        with :ok <- set_size(file, state.size),
             :ok <- Folder.sync(state.folder),
             do: {:ok, %{state | file: file}}

      {:ok, _size} ->
        Logger.error("somebody else has removed or cut the journal in #{state.folder}")
        load(state, file)

      error ->
        error
    end
  end

  defp replay(payload, place, read) do
    case Record.cast(payload) do
      {:ok, record} -> {:ok, %{read | index: note(read.index, record, place)}}
      {:newer, blobs} -> {:ok, %{read | kept: [{place, blobs} | read.kept]}}
      {:error, why} -> {:ok, %{read | rejected: [Map.put(why, :place, place) | read.rejected]}}
    end
  end

  ## Undamaged records that this version cannot use

  defp tell_newer(%{kept: []}), do: :ok

  defp tell_newer(state) do
    Logger.warning(
      "the journal in #{state.folder} has #{length(state.kept)} records of a newer version, which are kept for it"
    )
  end

  # They go to a log of their own, in the order in which they were written.
  defp quarantine(state, rejected) do
    name = "quarantined-#{System.system_time(:millisecond)}"

    with {:ok, file} <- Folder.create_file(path(state, name)) do
      copied =
        Enum.reduce_while(rejected, :ok, fn %{place: {offset, size}}, :ok ->
          with {:ok, bytes} <- reader(state.file).(offset, size),
               :ok <- :file.write(file, bytes),
               do: {:cont, :ok},
               else: (error -> {:halt, error})
        end)

      copied = with :ok <- copied, do: :file.sync(file)
      :file.close(file)
      if copied != :ok, do: File.rm(path(state, name))
      with :ok <- copied, do: Folder.sync(state.folder)
    end
    |> case do
      :ok ->
        name_rejected(state, rejected, "kept as #{name}")
        forget_aside(state, "quarantined-")
        true

      {:error, reason} ->
        name_rejected(
          state,
          rejected,
          "left where they are, no copy is possible: #{sentence(reason)}"
        )

        false
    end
  end

  defp name_rejected(state, rejected, where) do
    Logger.error(
      "the journal in #{state.folder} has #{length(rejected)} records that cannot be used, #{where}"
    )

    for %{record: kind, id: id, reason: reason, place: {offset, _size}} <-
          Enum.take(rejected, @named) do
      Logger.error(
        "not used from the journal in #{state.folder}: #{kind || "a record"} of #{id || "no readable id"} at byte #{offset}: #{reason}"
      )
    end
  end

  defp places_of(rejected), do: for(%{place: place} <- rejected, do: {place, []})

  # The caller of such a request was told that it is accepted, so it must be told how it ended.
  defp end_unreadable(%{file: nil} = state, _rejected), do: state

  defp end_unreadable(state, rejected) do
    now = System.system_time(:millisecond)
    error = Error.new(:internal, "what was asked for cannot be read any more; ask for it again")

    case for(
           %{record: "accept", id: id} when is_binary(id) <- rejected,
           not is_map_key(state.index, id),
           uniq: true,
           do: {:finish, id, now, {:error, error}}
         ) do
      [] -> state
      ends -> append(state, for(record <- ends, do: {nil, record}))
    end
  end

  # A request whose images are missing or damaged is done again.
  defp check_images(state, index) do
    Enum.reduce_while(index, {:ok, state}, fn {id, entry}, {:ok, state} ->
      bad =
        for blob <- blobs(entry),
            read = Folder.read_blob(state.folder, blob),
            not match?({:ok, _}, read),
            do: {blob, read}

      case Enum.find(bad, &match?({_, {:error, _}}, &1)) do
        {_blob, error} -> {:halt, error}
        nil when bad == [] -> {:cont, {:ok, state}}
        nil -> {:cont, {:ok, undone(state, id, entry, for({blob, _} <- bad, do: blob))}}
      end
    end)
  end

  defp undone(state, id, entry, bad) do
    report(state, 0, length(bad))
    Enum.each(bad, &Folder.delete_blob(state.folder, &1))

    index =
      if entry.accept,
        do: Map.put(state.index, id, %{entry | finish: nil}),
        else: Map.delete(state.index, id)

    %{state | index: index, damaged: state.damaged + length(bad)}
  end

  defp report(state, places, images) do
    what =
      for {n, what} <- [{places, "of its records"}, {images, "of its images"}],
          n > 0,
          do: "#{n} #{what}"

    Logger.error("the journal in #{state.folder} is damaged: #{Enum.join(what, ", ")}")

    Telemetry.execute([:journal, :damaged], %{records: places, images: images}, %{
      instance: state.instance
    })
  end

  # A hard link to the file, or a copy where the file system has no links.
  defp keep_aside(state) do
    name = "damaged-#{System.system_time(:millisecond)}"
    [journal, aside] = for name <- ["journal", name], do: path(state, name)

    with {:error, _reason} <- File.ln(journal, aside),
         {:error, reason} <- File.cp(journal, aside) do
      _ = File.rm(aside)
      Logger.error("a copy of the damaged journal cannot be kept: #{sentence(reason)}")
      false
    else
      :ok ->
        Logger.error("what was the journal in #{state.folder} is kept there as #{name}")
        forget_aside(state, "damaged-")
        true
    end
  end

  defp forget_aside(state, prefix) do
    with {:ok, names} <- File.ls(state.folder) do
      kept = names |> Enum.filter(&String.starts_with?(&1, prefix)) |> Enum.sort(:desc)
      for name <- Enum.drop(kept, @kept_aside), do: File.rm(path(state, name))
    end
  end

  ## Compaction

  # The log is rewritten when more than half of it is not needed, so this costs at most as much as the appends since the
  # last time.
  defp compact(%{size: size, compact_at: at} = state) when size <= at, do: state

  defp compact(state) do
    known = for {_id, entry} <- state.index, place <- places(entry), do: place
    newer = for {place, _blobs} <- state.kept, do: place
    live = for {_offset, size} <- known ++ newer, reduce: 0, do: (sum -> sum + size)

    if 2 * live < state.size, do: rewrite(state), else: %{state | compact_at: 2 * live}
  end

  # The new log is written beside the old one, which stays complete until the new one takes its name.
  defp rewrite(state) do
    case write_anew(state) do
      {:ok, state} -> state
      {:error, reason} -> not_rewritten(state, reason)
    end
  end

  defp write_anew(state) do
    new = path(state, "journal.new")
    _ = File.rm(new)

    with {:ok, file} <- :file.open(new, [:read, :write, :exclusive, :raw, :binary]),
         _ = File.chmod(new, 0o600) do
      with {:ok, read, size} <- copy(state, file),
           :ok <- :file.datasync(file),
           :ok <- File.rename(new, path(state, "journal")) do
        :file.close(state.file)

        {:ok,
         renamed(%{
           state
           | file: file,
             index: read.index,
             kept: read.kept ++ places_of(read.rejected),
             size: size,
             compact_at: max(state.compact_above, 2 * size)
         })}
      else
        {:error, reason} ->
          :file.close(file)
          _ = File.rm(new)
          {:error, reason}
      end
    end
  end

  # Until the name is durable a loss of power may bring the old log back, so nothing may be acknowledged before.
  defp renamed(state) do
    case Folder.sync(state.folder) do
      :ok ->
        state

      {:error, reason} ->
        :file.close(state.file)
        trouble(%{state | file: nil}, reason)
    end
  end

  defp not_rewritten(state, reason) do
    Logger.warning("the journal in #{state.folder} cannot be made smaller: #{sentence(reason)}")
    %{state | compact_at: state.size + state.compact_above}
  end

  defp copy(state, new) do
    known = for {_id, entry} = request <- state.index, do: {hd(places(entry)), sources(request)}
    newer = for {place, _blobs} <- state.kept, do: {place, [place]}
    read = %{index: %{}, kept: [], rejected: []}

    (known ++ newer)
    |> Enum.sort()
    |> Enum.flat_map(&elem(&1, 1))
    |> Enum.reduce_while({:ok, read, 0}, fn source, {:ok, read, size} ->
      with {:ok, payload} <- source(state, source),
           {:ok, bytes} <- Log.record(payload),
           place = {size, IO.iodata_length(bytes)},
           :ok <- :file.pwrite(new, size, bytes),
           {:ok, read} <- replay(payload, place, read) do
        {:cont, {:ok, read, size + elem(place, 1)}}
      else
        {:error, reason} -> {:halt, {:error, reason}}
        :damaged -> {:halt, {:error, :damaged}}
      end
    end)
  end

  defp sources({id, %{accept: accept, attempts: n, finish: finish}}) do
    List.wrap(accept) ++
      if(accept && n > 0, do: [{:attempt, id, n}], else: []) ++
      if(finish, do: [finish.place], else: [])
  end

  defp source(_state, {:attempt, _, _} = record), do: Record.encode(record)
  defp source(state, place), do: Log.payload(reader(state.file), place)

  defp path(state, name), do: Path.join(state.folder, name)

  defp reader(file) do
    fn offset, count ->
      case :file.pread(file, offset, count) do
        {:ok, bytes} when byte_size(bytes) == count -> {:ok, bytes}
        {:error, reason} -> {:error, reason}
        _shorter -> {:error, :eio}
      end
    end
  end

  defp set_size(file, size) do
    with {:ok, _} <- :file.position(file, size),
         :ok <- :file.truncate(file),
         do: :file.datasync(file)
  end

  # For a person, without a path.
  defp sentence(:held), do: "another instance uses its folder"

  defp sentence(:replaced),
    do: "another journal is in the place of its own, which only a new start may use"

  defp sentence(:not_ours), do: "others can look into its folder, which belongs to another user"

  defp sentence(:shared),
    do: "others can look into its folder, which holds more than a journal: give it one of its own"

  defp sentence(:unknown), do: "it is not in the journal"
  defp sentence(:damaged), do: "its record is damaged"
  defp sentence(:too_large), do: "it is larger than 64 MiB"
  defp sentence(:unencodable), do: "it holds what the journal cannot keep"
  defp sentence(reason), do: to_string(:file.format_error(reason))
end
