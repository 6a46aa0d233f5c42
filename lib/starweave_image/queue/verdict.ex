defmodule StarweaveImage.Queue.Verdict do
  @moduledoc false
  # What follows from the end of an attempt: the request runs again in company, alone or on trial; it is retried after a
  # pause; another model runs it; or it is given up, and requests of the same content are refused for a while. No
  # process and no clock; random numbers are those of `:rand`.
  #
  # The cause of a sidecar's death cannot be observed, so it is tested by bets. A request whose sidecar died while it
  # ran alone is put on trial: the sidecar rests for a random pause of 0 to `span` ms, then the request runs there
  # alone, and the bet is that the sidecar dies at the same point of the run as before. An external cause does not
  # depend on the pause, so it hits a window of w ms with a probability of at most w / `span`. A won bet multiplies the
  # request's odds by the fair factor for that probability; a lost one takes most of them. So a harmless request reaches
  # odds of n with a probability of at most 1 / n, however many trials it has (the odds are a test martingale; Ville's
  # inequality). A death while the sidecar rests loses the bet; deaths during its start, and in company, are not bets.
  #
  # The bet cannot detect a device on which all work dies. The other requests show that: if their runs fail as often in
  # the same period as those of the request, no request is given up.

  alias StarweaveImage.{Backoff, Error, Request}

  defmodule Case do
    @moduledoc false
    # A request that was running when a sidecar died. `deaths`: all of them; `alone`: those while it ran alone. `point`:
    # where in the run the last death alone happened. `stake`: the current bet, `{span, point}`. `since`: the values of
    # `{done, fallen}` when the case was opened.
    defstruct company: :any,
              deaths: 0,
              alone: 0,
              point: nil,
              stake: nil,
              odds: 1.0,
              since: {0, 0}
  end

  # `done`: requests that succeeded. `fallen`: deaths of sidecars that are evidence against the device: for a request
  # that later succeeded, all its deaths alone; for any other request only one, since it may have caused further ones
  # itself; and deaths with no request running. `well`: contents that succeeded. `refused`: contents in quarantine, with
  # the seed of the request that was given up. Both are kept until a time.
  defstruct [
    :max_attempts,
    :max_retries,
    :quarantine,
    cases: %{},
    done: 0,
    fallen: 0,
    well: %{},
    refused: %{}
  ]

  @type id :: String.t()
  @type company :: :any | :alone | :trial
  @typedoc """
  Where in a run a death happened: ms since the request was sent, and ms into its load or, after that, into its work.
  """
  @type point :: {non_neg_integer, {:load | :work, non_neg_integer}}
  @typedoc """
  The death of a sidecar: the requests that ran there and their points, whether a single request was its only work, the
  request for whose trial it rested, and whether it was at work at all.
  """
  @type death :: %{
          ran: [{id, point}],
          alone?: boolean,
          held: [id],
          at_work?: boolean
        }
  @type t :: %__MODULE__{}

  # After this many deaths, the cause is looked for.
  @patience 2
  # A pause is drawn from 0 to the sum of this and the time until the request's last death.
  @rest_ms 10_000
  # The bets `{parts, share}`: `share` of the odds is bet on a window of span / `parts`. `@kept` is not bet.
  @bets [{50, 0.45}, {16, 0.3}, {6, 0.15}]
  @kept 0.1
  # At most 1 in this many harmless requests that are put on trial is given up.
  @enough 500
  # The device is in doubt while the other requests' runs explain such a series of deaths with more than this
  # probability.
  @doubt 0.01
  # How often the application may end while a request runs, for each of `max_attempts`.
  @lives 10
  @most_remembered 1_000

  @retryable ~w(model_load_failed out_of_memory unavailable overloaded)a
  @replaceable ~w(model_load_failed model_not_found out_of_memory)a
  # The pause between two attempts of a request that failed for a temporary reason, in ms.
  @retry_pause {500, 30_000}

  @spec new(keyword) :: t
  def new(config),
    do: struct!(__MODULE__, Keyword.take(config, [:max_attempts, :max_retries, :quarantine]))

  ## Deaths

  @doc "Takes the death of a sidecar into account, for the requests that ran there and for all others."
  @spec died(t, death) :: t
  def died(verdict, death) do
    ran = for {id, point} <- death.ran, do: {id, died(opened(verdict, id), point, death)}
    held = for id <- death.held, a_case = verdict.cases[id], do: {id, lost(a_case)}
    fallen = if death.at_work? and ran == [], do: 1, else: 0
    cases = Map.merge(verdict.cases, Map.new(ran ++ held))
    %{verdict | cases: cases, fallen: verdict.fallen + fallen}
  end

  defp opened(verdict, id),
    do: verdict.cases[id] || %Case{since: {verdict.done, verdict.fallen}}

  defp died(a_case, point, %{alone?: true}) do
    factor = if a_case.stake, do: payout(a_case.stake, point), else: 1
    a_case = %{a_case | deaths: a_case.deaths + 1, alone: a_case.alone + 1}
    a_case = %{a_case | point: point, stake: nil, odds: a_case.odds * factor}

    cond do
      a_case.deaths < @patience and a_case.company == :any -> a_case
      # The bet was lost: the next attempt is without a pause, so as not to delay the request further.
      factor < 1 -> %{a_case | company: :alone}
      true -> %{a_case | company: :trial}
    end
  end

  defp died(a_case, _point, _in_company) do
    a_case = %{a_case | deaths: a_case.deaths + 1, stake: nil}
    if a_case.deaths < @patience, do: a_case, else: %{a_case | company: :alone}
  end

  # The sidecar died before the request was sent.
  defp lost(%{stake: nil} = a_case), do: a_case

  defp lost(a_case),
    do: %{a_case | stake: nil, odds: a_case.odds * @kept, company: :alone}

  # Half is bet on the time since the request was sent, half on the time within the phase, since a load may take longer
  # at one sidecar than at another.
  defp payout({span, {sent, {phase, ms}}}, {sent_now, {phase_now, ms_now}}) do
    second = if phase_now == phase, do: payout(span, ms, ms_now), else: @kept
    (payout(span, sent, sent_now) + second) / 2
  end

  defp payout(span, expected, ms) do
    won =
      for {parts, share} <- @bets,
          from = max(expected - span / parts / 2, 0),
          ms >= from and ms <= from + span / parts,
          do: share * parts

    @kept + Enum.sum(won)
  end

  @doc """
  Decides about a request whose sidecar died for `reason`: it goes on, or it is given up, and requests of the same
  content are refused from `now` on.
  """
  @spec judge(t, Request.t(), String.t(), integer) ::
          {:again, company} | {:give_up, Error.t(), t}
  def judge(verdict, request, reason, now) do
    a_case = verdict.cases[request.id]

    if a_case.odds >= @enough and a_case.alone >= verdict.max_attempts and
         not device_in_doubt?(verdict, request.id, a_case),
       do: {:give_up, given_up(a_case, reason), refuse(verdict, request, now)},
       else: {:again, a_case.company}
  end

  # The probability that as many runs in a row end by a death, by Laplace's rule of succession over the runs of other
  # requests. Without deaths that count in `fallen`, there is no evidence against the device.
  defp device_in_doubt?(verdict, id, %{since: {done, fallen}} = a_case) do
    others = Enum.count(verdict.cases, fn {other, %{alone: n}} -> other != id and n > 0 end)
    fallen = verdict.fallen - fallen + others
    done = verdict.done - done

    chance =
      for n <- 1..a_case.alone, reduce: 1.0, do: (p -> p * (fallen + n) / (fallen + done + n))

    fallen > 0 and chance > @doubt
  end

  defp given_up(a_case, reason) do
    Error.new(
      :sidecar_crashed,
      "the Python process ended under this request #{a_case.deaths} times, #{a_case.alone} of them while it ran alone, " <>
        "and not without it: #{reason}"
    )
  end

  @doc "The company in which the next attempt of a request runs."
  @spec company(t, id) :: company
  def company(verdict, id), do: Map.get(verdict.cases, id, %Case{}).company

  @doc "How often a sidecar has died while it ran the request."
  @spec deaths(t, id) :: non_neg_integer
  def deaths(verdict, id), do: Map.get(verdict.cases, id, %Case{}).deaths

  @doc "Makes the request run alone from now on, though no sidecar has died while it ran."
  @spec suspect(t, id) :: t
  def suspect(verdict, id),
    do: put_in(verdict.cases[id], %{opened(verdict, id) | company: :alone})

  @doc """
  Draws the ms for which a sidecar rests before a request on trial begins, and places the bet. 0, and no bet, if the
  pause is not well within the `left` ms until the deadline.
  """
  @spec stake(t, id, integer) :: {non_neg_integer, t}
  def stake(verdict, id, left) do
    %{point: {ms, _} = point} = verdict.cases[id]
    span = @rest_ms + ms

    if 2 * span < left,
      do: {:rand.uniform(span) - 1, put_in(verdict.cases[id].stake, {span, point})},
      else: {0, call_off(verdict, id)}
  end

  @doc "The attempt, or the pause before it, ended otherwise: cancels the bet."
  @spec call_off(t, id) :: t
  def call_off(verdict, id) do
    case verdict.cases do
      %{^id => _} -> put_in(verdict.cases[id].stake, nil)
      _ -> verdict
    end
  end

  @doc "The request has ended, in another way than `done/3`."
  @spec drop(t, id) :: t
  def drop(verdict, id), do: close(verdict, id, &min(&1, 1))

  defp close(verdict, id, count) do
    {a_case, cases} = Map.pop(verdict.cases, id, %Case{})
    %{verdict | cases: cases, fallen: verdict.fallen + count.(a_case.alone)}
  end

  ## Ends of the application

  @doc """
  Decides about a request from the journal that was running `ends` times when the application ended. That is no evidence
  against the request, since all running requests end with the application; but it must not be repeated for ever.
  """
  @spec recovered(t, id, non_neg_integer) :: {:go_on, t} | {:give_up, Error.t()}
  def recovered(verdict, id, ends) do
    cond do
      ends >= @lives * verdict.max_attempts ->
        {:give_up,
         Error.new(:sidecar_crashed, "the application ended #{ends} times while this request ran")}

      # Run alone, it can at least not take other work down with it.
      ends >= @patience ->
        {:go_on, suspect(verdict, id)}

      true ->
        {:go_on, verdict}
    end
  end

  ## Failures

  @doc """
  Decides about an attempt that ended with an error: the request is retried after a pause in ms, another model runs it,
  or it fails with the error. The facts are the `retries` so far, the `left` ms until its deadline, and the fallback
  models.
  """
  @spec failed(t, Error.t(), %{
          retries: non_neg_integer,
          left: integer,
          fallbacks: [String.t()]
        }) :: {:retry, pos_integer} | {:fallback, String.t(), [String.t()]} | :give_up
  def failed(verdict, error, %{retries: retries, left: left, fallbacks: fallbacks}) do
    pause = Backoff.pause(retries + 1, @retry_pause)
    again? = error.kind in @retryable and error.retryable? and retries < verdict.max_retries
    # The model could be loaded, but computes NaN or infinity.
    no_numbers? = error.kind == :internal and error.details[:field] == :model

    case fallbacks do
      _ when again? and pause < left -> {:retry, pause}
      [model | rest] when error.kind in @replaceable -> {:fallback, model, rest}
      [model | rest] when no_numbers? -> {:fallback, model, rest}
      _ -> :give_up
    end
  end

  ## Quarantine

  @doc "A request succeeded, so its content is not to blame where earlier requests with that content were given up."
  @spec done(t, Request.t(), integer) :: t
  def done(verdict, %{content: content} = request, now) do
    refused =
      case Map.pop(verdict.refused, content) do
        {nil, refused} -> refused
        {{until, seed}, refused} -> Map.put(refused, {content, seed}, {until, seed})
      end

    well = remember(verdict.well, content, now + verdict.quarantine, now)
    verdict = %{verdict | done: verdict.done + 1, well: well, refused: refused}
    close(verdict, request.id, & &1)
  end

  # Refuses the content under any id and seed; or only with this seed, if requests with the same content have succeeded.
  defp refuse(verdict, %{content: content, seed: seed}, now) do
    well? = Map.get(verdict.well, content, now) > now
    key = if well?, do: {content, seed}, else: content
    until = {now + verdict.quarantine, seed}
    %{verdict | refused: remember(verdict.refused, key, until, now)}
  end

  defp remember(map, key, value, now) do
    map =
      if map_size(map) < @most_remembered,
        do: map,
        else: Map.filter(map, fn {_, until} -> until(until) > now end)

    map = if map_size(map) < @most_remembered, do: map, else: %{}
    Map.put(map, key, value)
  end

  defp until({until, _seed}), do: until
  defp until(until), do: until

  @doc "Whether the request may be accepted, that is, whether its content is not in quarantine."
  @spec admit(t, Request.t(), integer) :: :ok | {:error, Error.t()}
  def admit(verdict, %{content: content, seed: seed}, now) do
    case for key <- [content, {content, seed}],
             {until, _} <- [verdict.refused[key]],
             until > now,
             do: until - now do
      [left | _] ->
        message =
          "this request ended its Python process again and again, and is refused for another #{ceil(left / 1000)} s"

        {:error, Error.new(:sidecar_crashed, message, %{retry_after_ms: left})}

      [] ->
        :ok
    end
  end
end
