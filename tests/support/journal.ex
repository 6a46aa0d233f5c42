defmodule StarweaveImage.TestJournal do
  @moduledoc """
  A BEAM of its own that uses a journal, for tests that kill it. It says what it does in a file, a line each,
  written before the next step is taken, so that a line survives the process as the journal does.

      iex> StarweaveImage.TestJournal.job("a") == StarweaveImage.TestJournal.job("a")
      true
  """

  import ExUnit.Callbacks, only: [on_exit: 1]

  alias StarweaveImage.{Error, Image, Journal, TestOSProcess}

  @enforce_keys [:said, :beam]
  defstruct [:said, :beam]

  @doc "Starts a BEAM that calls `function` of this module; `limit` is the size in bytes that its files may have."
  def start(folder, function, args, limit \\ "unlimited") do
    said = Path.join(folder, "said-#{System.unique_integer([:positive])}")

    paths =
      for app <- [:starweave_image, :elixir, :logger],
          do: app |> :code.lib_dir() |> Path.join("ebin")

    call = "'#{__MODULE__}':'#{function}'(#{Enum.map_join([said | args], ", ", &inspect/1)})"

    # A write over the limit fails then, instead of ending the process.
    command =
      "trap '' XFSZ; exec timeout -s KILL 120 prlimit --fsize=#{limit}:unlimited " <>
        ~s(erl -noinput -pa "$@" >'#{said}.out' 2>&1 </dev/null)

    arguments = ["-c", command, "sh"] ++ paths ++ ["-eval", call]
    Port.open({:spawn_executable, "/bin/sh"}, [:nouse_stdio, args: arguments])
    host = %__MODULE__{said: said, beam: nil}
    [["beam", pid] | _] = await(host, &match?([["beam" | _] | _], &1))
    host = %{host | beam: String.to_integer(pid)}
    on_exit(fn -> TestOSProcess.alive?(host.beam) && kill(host) end)
    host
  end

  @doc "Waits until what it has said, as lists of words, satisfies the condition; gives that."
  def await(host, condition) do
    TestOSProcess.await(fn -> condition.(said(host)) && said(host) end) ||
      raise "it said #{inspect(said(host))}, and #{File.read!(host.said <> ".out")}"
  end

  def said(host) do
    with {:ok, text} <- File.read(host.said),
         do: for(line <- String.split(text, "\n", trim: true), do: String.split(line)),
         else: (_ -> [])
  end

  @doc "Kills it with SIGKILL, at once when the condition is true; it is gone then."
  def kill(host, condition \\ fn -> true end) do
    # Waits for the word, since starting a process takes longer than what is to be interrupted.
    line = "read word; kill -9 #{host.beam}"
    killer = Port.open({:spawn_executable, "/bin/sh"}, args: ["-c", line])
    spin(condition, System.monotonic_time(:millisecond) + 300)
    Port.command(killer, "now\n")
    [] = TestOSProcess.await_gone([host.beam], 10_000)
    :ok
  end

  defp spin(condition, deadline) do
    condition.() || System.monotonic_time(:millisecond) > deadline || spin(condition, deadline)
  end

  ## What goes into the journal: made of the id, so that each knows what the other one wrote

  @doc "A job as the queue hands it over; `more` goes into its request."
  def job(id, more \\ %{}) do
    request = %{
      "id" => id,
      "prompt" => "a picture of #{id}",
      "seed" => 7,
      "image" => noise(id, 3_000),
      "strength" => 0.3
    }

    %{"request" => Map.merge(request, more), "submitted_at" => 1_700_000_000_000}
  end

  def images(id) do
    for index <- 0..1 do
      %Image{
        id: id,
        index: index,
        # The second one is that of all.
        data: noise(if(index == 0, do: id, else: "all"), 2_000),
        format: :png,
        width: 64,
        height: 64,
        sha256: "of #{id}",
        model: "starweave/tiny",
        prompt: "a picture of #{id}",
        seed: 0x7FFFFFFFFFFFFFFF,
        steps: 4,
        guidance_scale: 7.3,
        scheduler: nil,
        parameters: %{"seed" => 7, "loras" => [%{"scale" => 0.1}], "nothing" => nil},
        timings: %{total: 12, denoise: 7, queue: 0},
        notices: ["“étoile” is not known"],
        attempts: 2
      }
    end
  end

  # Full of what looks like records.
  defp noise(id, size) do
    hash = :crypto.hash(:sha256, id)
    part = hash <> <<0xC1, "SW", 1, 0xC1, "SW", 0, 16::32>>
    part |> :binary.copy(div(size, byte_size(part)) + 1) |> binary_part(0, size)
  end

  ## In the other BEAM

  @doc "Appends at random, and never ends; ids begin with the prefix."
  def append(said, folder, prefix) do
    say = begin(said)
    {:ok, _} = Journal.start_link(name: :journal, folder: folder, compact_above: 20_000)
    %{} = Journal.recover(:journal)
    say.("open")
    steps(say, prefix, 1, [])
  end

  defp steps(say, prefix, n, open) do
    open =
      case {Enum.random(1..10), open} do
        {random, _} when random <= 4 or open == [] ->
          id = "#{prefix}-#{n}"
          Journal.accept(:journal, id, job(id))
          [{id, 0} | open]

        {random, [{id, attempts} | rest]} when random <= 6 ->
          Journal.attempt(:journal, id, attempts + 1)
          [{id, attempts + 1} | rest]

        {random, open} when random <= 8 ->
          {id, _} = Enum.random(open)
          Journal.finish(:journal, id, {:ok, images(id)})
          open

        {_random, open} ->
          {id, _} = Enum.random(open)
          say.("forgets #{id}")
          Journal.forget(:journal, id)
          List.keydelete(open, id, 0)
      end

    attempts = Map.new(open)
    told(say, attempts)
    steps(say, prefix, n + 1, open)
  end

  defp told(say, attempts) do
    receive do
      {:journal, {operation, id}, :ok} ->
        say.("#{operation} #{id}")
        told(say, attempts)
    after
      # Some steps wait for the answer and some do not.
      Enum.random([0, 0, 2]) -> :ok
    end
  end

  @doc "Opens the journal, says how that went, and waits."
  def hold(said, folder) do
    say = begin(said)
    {:ok, _} = Journal.start_link(name: :journal, folder: folder)

    case Journal.recover(:journal) do
      %{} -> say.("open")
      {:error, sentence} -> say.("refused #{sentence}")
    end

    Process.sleep(:infinity)
  end

  @doc "Fills the journal until it is refused, then raises the limit and goes on; forgets what it could store."
  def fill(said, folder) do
    say = begin(said)
    {:ok, _} = Journal.start_link(name: :journal, folder: folder)
    %{} = Journal.recover(:journal)
    accept_until_refused(say, folder, 1)
  end

  defp accept_until_refused(say, folder, n) do
    size = fn -> File.stat!(Path.join(folder, "journal")).size end
    before = size.()

    case ask(say, :accept, "before-#{n}", &Journal.accept(:journal, &1, job(&1))) do
      :ok ->
        accept_until_refused(say, folder, n + 1)

      {:error, _sentence} ->
        say.("left #{size.() - before}")
        ask(say, :accept, "refused", &Journal.accept(:journal, &1, job(&1)))
        ask(say, :attempt, "before-1", &Journal.attempt(:journal, &1, 1))
        image = %{hd(images("large")) | data: :binary.copy("x", 200_000)}
        ask(say, :finish, "before-1", &Journal.finish(:journal, &1, {:ok, [image]}))
        attempt_until_refused(say)
        ask(say, :forget, "before-3", &Journal.forget(:journal, &1))
        %{unfinished: unfinished} = Journal.recover(:journal)
        say.("has #{length(unfinished)}")
        {_, 0} = System.cmd("prlimit", ["--pid", System.pid(), "--fsize=unlimited"])
        ask(say, :finish, "before-2", &Journal.finish(:journal, &1, {:ok, [image]}))
        ask(say, :accept, "after", &Journal.accept(:journal, &1, job(&1)))
        error = {:error, Error.new(:invalid_request, "no", %{field: :steps})}
        ask(say, :finish, "before-1", &Journal.finish(:journal, &1, error))
        say.("done")
        Process.sleep(:infinity)
    end
  end

  # Until there is not even room for a short one.
  defp attempt_until_refused(say) do
    with :ok <- ask(say, :attempt, "before-1", &Journal.attempt(:journal, &1, 1)),
         do: attempt_until_refused(say)
  end

  defp ask(say, operation, id, fun) do
    fun.(id)

    receive do
      {:journal, {^operation, ^id}, answer} ->
        say.("#{operation} #{id} #{inspect(answer)}")
        answer
    end
  end

  defp begin(said) do
    {:ok, _} = Application.ensure_all_started(:logger)
    {:ok, file} = :file.open(said, [:append, :raw])
    say = fn line -> :ok = :file.write(file, [line, "\n"]) end
    say.("beam #{System.pid()}")
    say
  end
end
