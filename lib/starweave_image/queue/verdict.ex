defmodule StarweaveImage.Queue.Verdict do
  @moduledoc false
  # What follows from the end of an attempt: the request goes on in company, alone or on trial; it is tried again
  # later; another model draws it; or it is given up, and its like refused for a while. No process and no clock; random
  # numbers are those of `:rand`.
  #
  # Who is to blame for the death of a sidecar cannot be seen, so blame is bet on. A request that died alone is put on
  # trial: its sidecar rests for a pause drawn from 0 to `span` ms, then the request runs there alone, and the bet is
  # that the sidecar will die at the point of the run at which it died the time before. Whoever kills from outside, by
  # whatever clock, does not know of the draw: he hits a window of w ms with a chance of at most w / `span`. A won bet
  # multiplies the request's odds by what is fair against that chance, a lost one takes most of them. So a request
  # that does nothing wrong reaches odds of n with a chance of at most 1 / n, however many trials it sees (the odds
  # are a test martingale; Ville's inequality). Deaths while the sidecar rests lose the bet; those while it starts,
  # and those in company, are no bets.
  #
  # The bet says nothing about a device on which all work dies. That is seen by the others: where their runs
  # end in the same time as badly as those of the request, nobody is given up.

  alias StarweaveImage.{Backoff, Error, Request}

  defmodule Case do
    @moduledoc false
    # Of a request under which a sidecar has died. `deaths` in all, and `alone`. `point`: where the last death alone came.
    # `stake`: the bet that is on, `{span, point}`. `since`: what `{done, fallen}` were when the case was opened.
    defstruct company: :any,
              deaths: 0,
              alone: 0,
              point: nil,
              stake: nil,
              odds: 1.0,
              since: {0, 0}
  end

  # `done`: requests that ended well. `fallen`: deaths of sidecars that speak against the device: all that came before
  # a request ended well, alone; one of a request that did not, since further ones may be its own doing; those under
  # no request. `well`: contents that came to an end, `refused`: those that are not taken in, with the seed of the one
  # that was given up; both until a time.
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
  Where a death came: ms since the request was sent, and ms in its load or, when that was over, in its work.
  """
  @type point :: {non_neg_integer, {:load | :work, non_neg_integer}}
  @typedoc """
  The death of a sidecar: who ran there and at which point, whether the one request there was all that it worked on,
  who was about to be tried there, and whether it was at work at all.
  """
  @type death :: %{
          ran: [{id, point}],
          alone?: boolean,
          held: [id],
          at_work?: boolean
        }
  @type t :: %__MODULE__{}

  # Deaths in company, or the first of all, after which the cause is looked for.
  @patience 2
  # A pause is drawn from 0 to this and the time that the request takes to die.
  @rest_ms 10_000
  # The shares of the odds that are bet on windows of a part of the span, and the one that is kept.
  @bets [{50, 0.45}, {16, 0.3}, {6, 0.15}]
  @kept 0.1
  # So rarely is a request given up that does nothing wrong: 1 in so many of those that come to trial.
  @enough 500
  # The device is in doubt as long as the others' runs might go like this with more than this chance.
  @doubt 0.01
  # How many lives of the application a request may end, for each of `max_attempts`.
  @lives 10
  @most_remembered 1_000

  @retryable ~w(model_load_failed out_of_memory unavailable overloaded)a
  @replaceable ~w(model_load_failed model_not_found out_of_memory)a
  # Between two tries of a request that failed in a way that may pass, in ms.
  @retry_pause {500, 30_000}

  @spec new(keyword) :: t
  def new(config),
    do: struct!(__MODULE__, Keyword.take(config, [:max_attempts, :max_retries, :quarantine]))

  ## Deaths

  @doc "Takes the death of a sidecar into account, for those who ran there and for all others."
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
      # A pause that was of no use delays it: the next try is without one.
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

  # Half is bet on the time since the request was sent, half on that since its load was over, which may take
  # longer at one sidecar than at another.
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
  What becomes of a request whose sidecar died for `reason`: it goes on, or it is given up and its like refused from
  `now` on.
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

  # The chance that as many runs in a row end by a death, by Laplace's rule of succession over those of others. Where
  # no sidecar died under others alone, nothing speaks against the device.
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

  @doc "In which company the next attempt of a request is to run."
  @spec company(t, id) :: company
  def company(verdict, id), do: Map.get(verdict.cases, id, %Case{}).company

  @doc "How often a sidecar has died under the request."
  @spec deaths(t, id) :: non_neg_integer
  def deaths(verdict, id), do: Map.get(verdict.cases, id, %Case{}).deaths

  @doc "The request runs alone from now on, though no sidecar has died under it."
  @spec suspect(t, id) :: t
  def suspect(verdict, id),
    do: put_in(verdict.cases[id], %{opened(verdict, id) | company: :alone})

  @doc """
  For how many ms the sidecar of a request that is on trial rests before it begins. None, and no bet, where that is
  not well within the `left` ms until its deadline.
  """
  @spec stake(t, id, integer) :: {non_neg_integer, t}
  def stake(verdict, id, left) do
    %{point: {ms, _} = point} = verdict.cases[id]
    span = @rest_ms + ms

    if 2 * span < left,
      do: {:rand.uniform(span) - 1, put_in(verdict.cases[id].stake, {span, point})},
      else: {0, call_off(verdict, id)}
  end

  @doc "The attempt or the pause before it ended in another way: the bet is off."
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

  ## Lives of the application

  @doc """
  What becomes of a request of the journal under which the application ended `ends` times. That is no evidence, for
  whatever ends an application ends all that runs in it; but it must not be done for ever.
  """
  @spec recovered(t, id, non_neg_integer) :: {:go_on, t} | {:give_up, Error.t()}
  def recovered(verdict, id, ends) do
    cond do
      ends >= @lives * verdict.max_attempts ->
        {:give_up,
         Error.new(:sidecar_crashed, "the application ended #{ends} times while this request ran")}

      # Alone it takes at least no other's work with it.
      ends >= @patience ->
        {:go_on, suspect(verdict, id)}

      true ->
        {:go_on, verdict}
    end
  end

  ## Failures

  @doc """
  What becomes of an attempt that ended with an error: it is made again after a pause in ms, another model draws it,
  or the error is the request's. `retries` so far, `left` ms until its deadline, and the models that may take its
  place.
  """
  @spec failed(t, Error.t(), %{
          retries: non_neg_integer,
          left: integer,
          fallbacks: [String.t()]
        }) :: {:retry, pos_integer} | {:fallback, String.t(), [String.t()]} | :give_up
  def failed(verdict, error, %{retries: retries, left: left, fallbacks: fallbacks}) do
    pause = Backoff.pause(retries + 1, @retry_pause)
    again? = error.kind in @retryable and error.retryable? and retries < verdict.max_retries
    # It could be loaded, and what it computes is NaN.
    no_numbers? = error.kind == :internal and error.details[:field] == :model

    case fallbacks do
      _ when again? and pause < left -> {:retry, pause}
      [model | rest] when error.kind in @replaceable -> {:fallback, model, rest}
      [model | rest] when no_numbers? -> {:fallback, model, rest}
      _ -> :give_up
    end
  end

  ## Quarantine

  @doc "A request came to its end: whatever was given up of the same content, the content is not to blame."
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

  # By content, under any id and seed; but with its seed alone where others of the content were drawn well.
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

  @doc "Whether the request may be taken in, as far as what became of its like is concerned."
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
