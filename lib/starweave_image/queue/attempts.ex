defmodule StarweaveImage.Queue.Attempts do
  @moduledoc false
  # The attempts of requests: which one begins next and where, and what follows from its end, for its own request and
  # for others. Keeps `Schedule`, which has the places of requests, and `Verdict`, which has the evidence against them,
  # in step. Pure; the queue carries out the decisions.

  alias StarweaveImage.{Error, Request}
  alias StarweaveImage.Queue.{Fleet, Schedule, Verdict}

  @enforce_keys [:schedule, :verdict]
  defstruct [:schedule, :verdict]

  @type t :: %__MODULE__{schedule: Schedule.t(), verdict: Verdict.t()}
  @type id :: Schedule.id()
  @type index :: Schedule.index()
  @typedoc """
  What follows for a request: it waits for its next attempt, for a reason of `Schedule.return/4`; it stands aside for a
  pause in ms first; it waits for an attempt with another model, and with further fallbacks after that one; or it ends.
  """
  @type outcome ::
          {:again, id, :died | :stopped | :yielded}
          | {:retry, id, pause_ms :: pos_integer}
          | {:fallback, id, model :: String.t(), rest :: [String.t()], Error.t()}
          | {:end, id, Error.t()}

  @spec new(keyword) :: t
  def new(config),
    do: %__MODULE__{schedule: Schedule.new(config), verdict: Verdict.new(config)}

  @doc "Adds a request, with the options of `Schedule.push/4`."
  @spec open(t, id, :waiting | :aside, keyword) :: t
  def open(attempts, id, place, options) do
    company = Verdict.company(attempts.verdict, id)
    schedule = Schedule.push(attempts.schedule, id, place, [company: company] ++ options)
    %{attempts | schedule: schedule}
  end

  @doc "As `Verdict.recovered/3`; called before a request from an earlier run of the application is added."
  @spec recovered(t, id, non_neg_integer) :: {:go_on, t} | {:give_up, Error.t()}
  def recovered(attempts, id, ends) do
    with {:go_on, verdict} <- Verdict.recovered(attempts.verdict, id, ends),
         do: {:go_on, %{attempts | verdict: verdict}}
  end

  @doc """
  As `Schedule.next/1`, with the ms for which a sidecar rests. `left` gives the ms until a request's deadline.
  """
  @spec next(t, (id -> integer)) ::
          {:run, id, index, t}
          | {:rest, id, non_neg_integer, t}
          | {:yield, id, index, t}
          | :nothing
  def next(attempts, left) do
    case Schedule.next(attempts.schedule) do
      {:rest, id, _index, schedule} ->
        {pause, verdict} = Verdict.stake(attempts.verdict, id, left.(id))
        {:rest, id, pause, %{attempts | schedule: schedule, verdict: verdict}}

      {what, id, index, schedule} ->
        {what, id, index, %{attempts | schedule: schedule}}

      :nothing ->
        :nothing
    end
  end

  @doc """
  A sidecar died for `reason`. Returns the outcome of each request that ran there, oldest first. `open` has all
  unfinished requests by id.
  """
  @spec died(t, index, Verdict.death(), %{id => Request.t()}, String.t(), integer) ::
          {[outcome], t}
  def died(attempts, index, death, open, reason, now) do
    {running, schedule} = Schedule.lost(attempts.schedule, index)
    attempts = %{attempts | schedule: schedule, verdict: Verdict.died(attempts.verdict, death)}
    Enum.map_reduce(running, attempts, &judge(&2, open[&1], open, reason, now))
  end

  # The next attempt has the same seed, which was drawn before the first one.
  defp judge(%{verdict: verdict} = attempts, %{id: id} = request, open, reason, now) do
    case Verdict.judge(verdict, request, reason, now) do
      {:again, company} ->
        schedule =
          attempts.schedule
          |> Schedule.company(id, company)
          |> Schedule.return(id, :waiting, :died)

        {{:again, id, :died}, %{attempts | schedule: schedule}}

      {:give_up, error, verdict} ->
        attempts = %{attempts | verdict: Verdict.drop(verdict, id)}
        {{:end, id, error}, suspect(attempts, request, open)}
    end
  end

  # Other requests with the content of one that was given up are not penalised, but from now on they run alone, so that
  # a death takes no other work with it.
  defp suspect(attempts, %{id: given_up, content: content}, open) do
    for {id, %{content: ^content}} when id != given_up <- open,
        Verdict.company(attempts.verdict, id) == :any,
        reduce: attempts do
      attempts ->
        schedule = Schedule.company(attempts.schedule, id, :alone)
        %{attempts | schedule: schedule, verdict: Verdict.suspect(attempts.verdict, id)}
    end
  end

  @doc "A sidecar was stopped on purpose: its unfinished requests are not blamed for its end."
  @spec stopped(t, index) :: {[outcome], t}
  def stopped(attempts, index) do
    {running, schedule} = Schedule.lost(attempts.schedule, index)

    Enum.map_reduce(running, %{attempts | schedule: schedule}, fn id, attempts ->
      {{:again, id, :stopped}, return(attempts, id, :waiting, :stopped)}
    end)
  end

  @doc "An attempt ended with an error, with the facts that `Verdict.failed/3` needs."
  @spec failed(t, id, Error.t(), map) :: {outcome, t}
  def failed(attempts, id, %{kind: :cancelled}, facts) do
    # A cancel by the owner would have ended the request. So either it makes room for an interactive request, or its
    # sidecar is shutting down.
    if Schedule.yielding?(attempts.schedule, id),
      do: {{:again, id, :yielded}, return(attempts, id, :waiting, :yielded)},
      else: failed(attempts, id, Fleet.unavailable("the sidecar stopped"), facts)
  end

  def failed(attempts, id, error, facts) do
    case Verdict.failed(attempts.verdict, error, facts) do
      {:retry, pause} ->
        {{:retry, id, pause}, return(attempts, id, :aside, :failed)}

      {:fallback, model, rest} ->
        attempts = %{attempts | schedule: Schedule.use_model(attempts.schedule, id, model)}
        {{:fallback, id, model, rest, error}, return(attempts, id, :waiting, :failed)}

      :give_up ->
        {{:end, id, error}, attempts}
    end
  end

  defp return(attempts, id, place, reason) do
    verdict = Verdict.call_off(attempts.verdict, id)
    schedule = Schedule.return(attempts.schedule, id, place, reason)
    %{attempts | schedule: schedule, verdict: verdict}
  end

  @doc "A request succeeded at a sidecar in `run_ms`, of which loading a model took `load_ms`."
  @spec done(t, Request.t(), index, non_neg_integer, non_neg_integer, integer) :: t
  def done(attempts, request, index, run_ms, load_ms, now) do
    verdict = Verdict.done(attempts.verdict, request, now)
    %{measured(attempts, index, run_ms, load_ms) | verdict: verdict}
  end

  @doc "An attempt ran to its end at a sidecar, but its answer could not be used."
  @spec measured(t, index, non_neg_integer, non_neg_integer) :: t
  def measured(attempts, index, run_ms, load_ms),
    do: %{attempts | schedule: Schedule.measure(attempts.schedule, index, run_ms, load_ms)}

  @doc "The request has ended."
  @spec drop(t, id) :: t
  def drop(attempts, id) do
    schedule = Schedule.drop(attempts.schedule, id)
    %{attempts | schedule: schedule, verdict: Verdict.drop(attempts.verdict, id)}
  end
end
