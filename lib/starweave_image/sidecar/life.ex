defmodule StarweaveImage.Sidecar.Life do
  @moduledoc false
  # The state machine of a sidecar across its Python processes: the state, the transition for each event, and the
  # actions that the owner must take. The full table is in docs/architecture.md; a test compares this module with it. No
  # process and no clock; the pauses use random numbers from `:rand`.

  alias StarweaveImage.Backoff

  # `patience`: the budget for failed starts before callers are told that the sidecar is down; until a process was
  # ready, one failed start spends it. `failures`: consecutive ends, which determine the pause before the next start.
  # `ready?`: whether the present process became ready. `words`: its own complaint. `sentence`: why it is condemned;
  # `stalled?`: whether for hanging. `logged`: the reason of the last failed start, which is not logged twice.
  @enforce_keys [:backoff]
  defstruct [
    :backoff,
    :words,
    :sentence,
    :logged,
    state: :resting,
    patience: 1,
    failures: 0,
    ready?: false,
    stalled?: false
  ]

  @typedoc """
  - `:resting`: there is no process; the next start follows after a pause
  - `:started`: the process is started and has sent nothing yet
  - `:greeted`: it has sent a sign of life and was sent its configuration; it may be busy with imports
  - `:ready`: it accepts work
  - `:condemned`: it must be killed and its messages are ignored; it still runs if the kill has not been possible yet
  """
  @type state :: :resting | :started | :greeted | :ready | :condemned

  @typedoc """
  What happened: a process was started; it sent a heartbeat; it sent `ready`, or a complaint; it was found to hang
  (`:stalls`) or to break the protocol (`:fails`); it ended, killed from outside or otherwise, or could not be started;
  it has been ready long enough to count as stable.
  """
  @type event ::
          :started
          | :heartbeat
          | {:ready, term}
          | {:complaint, sentence :: String.t()}
          | {:stalls, sentence :: String.t()}
          | {:fails, sentence :: String.t()}
          | {:ended, sentence :: String.t(), :killed | :otherwise}
          | :stable

  @typedoc """
  What the owner must do: send the configuration; report that the process is ready; log its complaint; kill it; or clean
  up after it, report its end, and start the next one after a pause in ms. `news?` says whether to log the sentence.
  """
  @type action ::
          :greet
          | {:announce, term}
          | {:complain, String.t(), news? :: boolean}
          | :kill
          | {:rest, String.t(), pause_ms :: non_neg_integer, news? :: boolean}

  @type t :: %__MODULE__{}

  # The budget for failed starts once a sidecar has worked; when it is spent, the accepted requests fail. A failed start
  # costs `@failed`. A start killed from outside costs less, since it says little about whether a start can succeed.
  @patience 9
  @failed 3
  @killed 1

  @doc "A life before its first start. The pauses between starts are from `first` to `most` ms."
  @spec new({first :: pos_integer, most :: pos_integer}) :: t
  def new(backoff), do: %__MODULE__{backoff: backoff}

  @doc """
  The actions to take and the next state after an event. An event without a meaning in the present state changes
  nothing.
  """
  @spec next(t, event) :: {[action], t}
  def next(%{state: :resting} = life, :started),
    do: {[], %{life | state: :started, ready?: false, words: nil, sentence: nil, stalled?: false}}

  def next(%{state: :started} = life, :heartbeat), do: {[:greet], %{life | state: :greeted}}

  def next(%{state: state} = life, {:ready, message}) when state in [:started, :greeted, :ready],
    do:
      {[{:announce, message}],
       %{life | state: :ready, ready?: true, patience: @patience, logged: nil}}

  # Before `ready`, a complaint is the reason why the process cannot start.
  def next(%{state: state} = life, {:complaint, words}) when state in [:started, :greeted],
    do: {[{:complain, words, news?(life, words)}], %{life | words: words}}

  def next(%{state: :ready} = life, {:complaint, words}), do: {[{:complain, words, true}], life}

  def next(%{state: state} = life, {judgement, sentence})
      when state in [:started, :greeted, :ready] and judgement in [:stalls, :fails],
      do:
        {[:kill], %{life | state: :condemned, sentence: sentence, stalled?: judgement == :stalls}}

  def next(life, {:ended, sentence, how}), do: ended(life, sentence, how)

  def next(%{state: :ready} = life, :stable), do: {[], %{life | failures: 0}}
  def next(life, _meaningless), do: {[], life}

  # There is no pause after the first end of a process that had worked; it grows with each further end.
  defp ended(%{ready?: true} = life, sentence, _how) do
    sentence = life.sentence || sentence
    pause = Backoff.pause(life.failures, life.backoff)
    {[{:rest, sentence, pause, true}], rest(life, logged: nil)}
  end

  defp ended(life, sentence, how) do
    cost =
      if how == :killed and {life.sentence, life.words} == {nil, nil}, do: @killed, else: @failed

    sentence = life.sentence || life.words || sentence
    pause = Backoff.pause(life.failures + 1, life.backoff)
    patience = max(life.patience - cost, 0)

    {[{:rest, sentence, pause, news?(life, sentence)}],
     rest(life, logged: sentence, patience: patience)}
  end

  defp rest(life, fields) do
    struct!(
      %{life | state: :resting, ready?: false, words: nil, sentence: nil, stalled?: false},
      [failures: life.failures + 1] ++ fields
    )
  end

  @doc "Whether the sentence has not been logged yet as the reason of failing starts."
  @spec news?(t, String.t()) :: boolean
  def news?(life, sentence), do: life.logged != sentence

  @doc "The phase to report. A sidecar that is down stays down until it is ready; meanwhile callers get errors at once."
  @spec phase(t) :: :starting | :ready | :stalled | :down
  def phase(%{stalled?: true}), do: :stalled
  def phase(%{ready?: true}), do: :ready
  def phase(%{patience: 0}), do: :down
  def phase(_life), do: :starting
end
